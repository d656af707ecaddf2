"""Check a configuration, read a sample and plan its memory, all before any weights are loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from specvlm.app.skeletons import skeleton_of
from specvlm.config import RunConfig, home, listed, model_folder
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefix_budget import GIB, share_of
from specvlm.decoding.room import needs_for
from specvlm.engine import captures_on
from specvlm.errors import SURROGATE, MissingVideo, UserError, line
from specvlm.models import memory_plan
from specvlm.models.known_videos import KnownVideos
from specvlm.models.load import check_pair, dtype_of, kind_of
from specvlm.models.partition import check_shares
from specvlm.models.placement import Placement
from specvlm.models.video_lm import VideoLM
from specvlm.process.settings import settled
from specvlm.strategies import Sample, registry
from specvlm.strategies.fence import inside, is_ours, needs_of
from specvlm.types import GenerationOptions, VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.images import read_image
from specvlm.video.video import Clip, Processed, probe, read_video

LONGEST_QUESTION = 100_000  # characters
KEPT = "kept prompts"  # part of a memory plan
# Advice for a run that does not fit into memory.
SMALLER = "take fewer frames (frames=…), fewer new tokens (max_new_tokens=…), a smaller dtype or another device"


@dataclass(frozen=True)
class Setup:
    """A checked configuration with its strategies and its models as skeletons, which have no weights.

    Attributes:
        draft: None if the drafter needs no draft model.
        vocabulary: Number of token ids that target and draft share; without a draft, the target's.
        dtype: Dtype of the target.
        kinds: By side ("target", "draft"), how `load` will quantise text layers and head; None: not at all.
    """

    cfg: RunConfig
    places: Placement
    pruner: Any
    drafter: Any
    verifier: Any
    target: VideoLM
    draft: VideoLM | None
    vocabulary: int
    dtype: torch.dtype
    kinds: dict[str, str | None]

    def graph(self) -> DecodingGraph:
        """Build a graph of skeletons, to plan memory. Raises UserError if the pruner reads a layer the target lacks."""
        return DecodingGraph(self.target, self.draft, self.pruner, self.drafter, self.verifier, self.options)

    @property
    def options(self) -> GenerationOptions:
        """Generation options of the configuration."""
        cfg = self.cfg
        own = (cfg.max_new_tokens, cfg.ratio, cfg.positions, cfg.seed, cfg.repetition_penalty)
        return GenerationOptions(*own, record=cfg.record)


@dataclass(frozen=True)
class Reading:
    """A sample whose video was read and made into the target's prompt.

    Attributes:
        clip: Name of the video.
        video_s: Seconds spent on reading the video and making the prompt.
        read_bytes: Bytes of host memory that frames and pixel tensors take while reading.
        reader: The video reader used, and why; empty if no file was read.
    """

    prompt: VideoPrompt
    clip: str
    question: str
    video_s: float
    read_bytes: int
    reader: str


@dataclass(frozen=True)
class Prepared(Setup, Reading):
    """A configuration and a sample that fit into memory.

    Attributes:
        kept: Number of video tokens that the drafter may see.
        layers: Number of layers on each device of a split target; empty if it is not split.
        plans: Memory plan of each device of this process, and of the host if the next video is read ahead.
    """

    kept: int
    layers: list[int]
    plans: dict[torch.device, memory_plan.MemoryPlan]

    @property
    def planned(self) -> int:
        """Planned bytes, summed over `plans`."""
        return sum(plan.total for plan in self.plans.values())


def set_up(cfg: RunConfig, places: Placement) -> Setup:
    """Build strategies and skeletons, and check everything that needs no video. Raises UserError if a check fails."""
    pruner, drafter, verifier = (registry.build(kind, getattr(cfg, kind)) for kind in ("pruner", "drafter", "verifier"))
    ours = all(map(is_ours, (pruner, drafter, verifier)))
    target = skeleton_of(model_folder(cfg.target.path), cfg.mrope, ours)
    target.check_template()
    draft = skeleton_of(model_folder(cfg.draft.path), cfg.mrope, ours) if drafter.model == "draft" else None
    vocabulary = check_pair(target, draft) if draft else target.vocabulary
    if places.ranks > 1:
        check_shares(target.hf.config, places.ranks, "target.parallel=tensor", "take target.parallel=layers")
        if draft and places.draft_shared:
            check_shares(draft.hf.config, places.ranks, "draft.parallel=tensor", "leave draft.parallel out")
    sides = {side: model for side, model in (("target", target), ("draft", draft)) if model}
    asked = {"target": cfg.target.weights, "draft": cfg.draft.weights}
    kinds = {s: kind_of(asked[s], dtype_of(model, cfg.dtype), f"{s}.weights", model.quantised) for s, model in sides.items()}
    check_reference(cfg, target, kinds["target"])
    setup = Setup(cfg, places, pruner, drafter, verifier, target, draft, vocabulary, dtype_of(target, cfg.dtype), kinds)
    with settled(), inside(verifier):
        setup.graph()
    for strategy in (pruner, drafter):
        with settled():  # reading `needs` may run code of a plugin
            needs_of(strategy)
    return setup


def check_reference(cfg: RunConfig, target: VideoLM, kind: str | None) -> None:
    """Raise UserError if `check=…` is set but cannot check this target. kind: quantisation of its text layers."""
    if cfg.check is None:
        return
    wanted = f"check={cfg.check} checks the answer with Hugging Face's own model"
    if kind:
        raise UserError(f"{wanted}, and target.weights={kind} makes it a different model: leave out target.weights or check")
    if target.quantised:
        raise UserError(f"{wanted}, which does not support checkpoints quantised by {target.quantised}: leave check out")
    if cfg.target.parallel == "tensor":
        raise UserError(f"{wanted}, which needs more memory than ranks have: use target.parallel=layers, or leave check out")
    if cfg.mrope != "hf" and target.axes > 1:
        raise UserError(f"{wanted}, whose positions differ from mrope={cfg.mrope}: use mrope=hf, or leave check out")


def own_sample(cfg: RunConfig) -> Sample:
    """Make the sample of a run without a data set, from the videos, images and question of its configuration."""
    video, *more = map(find_clip, listed(cfg.video))
    asked = getattr(cfg, "image", None)  # an older folder's configuration has no such key
    images = () if asked is None else tuple(map(home, listed(asked)))
    return Sample("", video, cfg.question or "describe the video.", more=tuple(more), images=images)


def read(setup: Setup, sample: Sample, known: KnownVideos | None = None) -> Reading:
    """Read the videos and images and make the prompt.

    Args:
        setup: The checked configuration.
        sample: The sample.
        known: Videos read earlier, whose files need not be decoded again. Not used if prompts are not kept.

    Raises:
        MissingVideo: A video is missing.
        UserError: A video or an image cannot be used.
    """
    check_question(sample.question)
    start = perf_counter()
    known = known if keeps_prompts(setup.cfg, setup.places) else None
    clips = [processed(setup, replace(sample, video=video), known) for video in (sample.video, *sample.more)]
    images = [read_image(path) for path in sample.images]
    prompt = setup.target.prompt(sample.question, clips, images, max_pixels=setup.cfg.max_pixels)
    videos = zip(clips, (sample.video, *sample.more), strict=True)
    names = [clip.source if callable(source) else source.name for clip, source in videos]
    held = [part for item in prompt.items for part in item.values() if isinstance(part, torch.Tensor)]
    size = sum(tensor.nbytes for tensor in (*held, *images)) + sum(clip.nbytes for clip in clips)
    readers = ", ".join(dict.fromkeys(clip.reader for clip in clips))
    name = ", ".join([*(path.name for path in sample.images), *names])
    return Reading(prompt, name, sample.question, perf_counter() - start, size, readers)


def processed(setup: Setup, sample: Sample, known: KnownVideos | None) -> Processed:
    """Return a sample's video, preprocessed. Reads it unless `known` has it. Raises what `read` raises."""
    cfg, target, video = setup.cfg, setup.target, sample.video
    sample_frames = partial(frames_of, cfg, target, sample)
    if known is None or not isinstance(video, Path):
        return target.processed(sample_frames(), cfg.max_pixels)
    check_name(video)
    how = (cfg.frames, cfg.fps, cfg.reader, sample.start, sample.end)
    return known.get(target, video, how, sample_frames, cfg.max_pixels)


def keeps_prompts(cfg: RunConfig, places: Placement) -> bool:
    """Whether prompts are kept for later samples. With several ranks they are not, since their stores could differ."""
    return cfg.dataset is not None and cfg.prefixes is not False and places.ranks == 1


def kept_bytes(cfg: RunConfig, places: Placement, left: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Return the bytes that kept prompts may take on each device. left: bytes per device that nothing else needs."""
    if not keeps_prompts(cfg, places):
        return {}
    devices = list(dict.fromkeys(places.target))
    if cfg.prefixes == "auto":
        return {device: share_of(device, max(0, left[device])) for device in devices}
    return {device: int(GIB * cfg.prefixes) // len(devices) for device in devices}


def reads_ahead(cfg: RunConfig, places: Placement) -> bool:
    """Whether to read the next video during decoding. prefetch=auto: not on a CPU, where that slows decoding down."""
    if cfg.dataset is None:
        return False
    return places.first.type == "cuda" if cfg.prefetch == "auto" else bool(cfg.prefetch)


def check_question(question: object) -> None:
    """Raise UserError if the question is not a string, contains surrogates, or is too long."""
    if not isinstance(question, str) or SURROGATE.search(question):
        raise UserError(f"the question is not a text: {line(repr(question))}")
    if len(question) > LONGEST_QUESTION:
        raise UserError(f"the question has {len(question)} characters, at most {LONGEST_QUESTION} are allowed")


def check_name(path: Path) -> None:
    """Raise MissingVideo for a path that cannot be looked up. A missing file is reported later, when it is opened."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise MissingVideo(f"no such file: {path} ({getattr(error, 'strerror', None) or 'not a name'})") from None


def frames_of(cfg: RunConfig, target: VideoLM, sample: Sample) -> Clip:
    """Read those frames of the sample's video that the target sees. Raises what `read` raises."""
    with inside(f"dataset={cfg.dataset.name}" if cfg.dataset else "video"):
        source = sample.video() if callable(sample.video) else sample.video
    if isinstance(source, Path):
        check_name(source)
    asked = {"frames": cfg.frames, "fps": cfg.fps}
    part: dict[str, Any] = {"start": sample.start, "end": sample.end}
    sampling = asked if any(asked.values()) else target.sampling(probe(source, cfg.reader, **part))
    return read_video(source, reader=cfg.reader, **part, **sampling)


def plan(
    setup: Setup, reading: Reading, held: Mapping[torch.device, int] | None = None, layers: Sequence[int] = ()
) -> Prepared:
    """Plan the memory of a request.

    Args:
        setup: The checked configuration.
        reading: The sample.
        held: Bytes per device of loaded models and caches that the request reuses.
        layers: Number of layers per device, if a split target is already loaded.

    Raises:
        UserError: A device has too little free memory, or the target has fewer layers than devices.
    """
    cfg, places, prompt, graph = setup.cfg, setup.places, reading.prompt, setup.graph()
    dtypes = {"target": setup.dtype} | ({"draft": dtype_of(setup.draft, cfg.dtype)} if setup.draft else {})
    joined = cfg.batch > 1 and captures_on(cfg.engine, places.first)
    needs = needs_for(graph, prompt, graph.options, dtypes, setup.kinds, places.ranks, joined)
    patches = max(map(setup.target.vision_rows, prompt.videos), default=0)
    free = {device: memory_plan.free_bytes(device) + (held or {}).get(device, 0) for device in places.devices}
    plans, counts = memory_plan.plan(needs[0], needs[1] if needs[1:] else None, patches, places, free, layers)
    if reads_ahead(cfg, places):
        host = torch.device("cpu")
        parts = plans[host].parts if host in plans else {}
        plans[host] = memory_plan.MemoryPlan(parts | {"the next video": reading.read_bytes})
        free.setdefault(host, memory_plan.free_bytes(host))
    for device, size in kept_bytes(cfg, places, {d: free[d] - plans[d].total for d in places.target}).items():
        plans[device] = memory_plan.MemoryPlan(plans[device].parts | {KEPT: size})
    for device, planned in plans.items():
        have = free[device]
        if planned.total > have:
            advice = f"{SMALLER}, or more GPUs" if places.parallel else SMALLER
            needed = f"{planned.total / 2**30:.1f} GiB on {device}"
            raise UserError(f"the run needs about {needed}, but {have / 2**30:.1f} GiB are free: {advice}")
    return Prepared(**vars(setup), **vars(reading), kept=graph.budget(prompt), layers=counts, plans=plans)
