"""Before any weight is loaded: what a configuration comes to, what a sample asks, and whether there is memory for it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from specvlm.app import memory_plan
from specvlm.app.placement import Placement
from specvlm.config import RunConfig, model_folder
from specvlm.decoding.collect import held_bytes
from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import SURROGATE, MissingVideo, UserError, line
from specvlm.models.load import check_pair, dtype_of, kind_of, skeleton
from specvlm.models.partition import check_shares
from specvlm.models.video_lm import VideoLM
from specvlm.process.settings import settled
from specvlm.strategies import Sample, registry
from specvlm.strategies.fence import inside, needs_of, sizes_of
from specvlm.types import GenerationOptions, VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.video import Clip, probe, read_video

LONGEST_QUESTION = 100_000  # characters
SMALLER = "take fewer frames (frames=…), fewer new tokens (max_new_tokens=…), a smaller dtype or another device"


@dataclass(frozen=True)
class Setup:
    """A configuration, checked; of the models their skeletons. draft: None where the drafter needs none."""

    cfg: RunConfig
    places: Placement
    pruner: Any
    drafter: Any
    verifier: Any
    target: VideoLM
    draft: VideoLM | None
    vocabulary: int
    dtype: torch.dtype
    kinds: dict[str, str | None]  # by side: what its text part is quantised to, None for not at all

    def graph(self) -> DecodingGraph:
        """Of skeletons: it cannot decode, and knows its budget. Raises UserError where parts do not go together."""
        return DecodingGraph(self.target, self.draft, self.pruner, self.drafter, self.verifier, self.options)

    @property
    def options(self) -> GenerationOptions:
        cfg = self.cfg
        own = (cfg.max_new_tokens, cfg.ratio, cfg.positions, cfg.seed, cfg.repetition_penalty)
        return GenerationOptions(*own, record=cfg.record)


@dataclass(frozen=True)
class Reading:
    """A sample as the target is asked it.

    video_s: seconds it took to read the video and make the prompt, read_bytes: what was held then: frames and pixels.
    reader: what read the file, and why that.
    """

    prompt: VideoPrompt
    clip: str
    question: str
    video_s: float
    read_bytes: int
    reader: str


@dataclass(frozen=True)
class Prepared(Setup, Reading):
    """Both, and room found for them."""

    kept: int
    layers: list[int]  # of each device, where they are split
    plans: dict[torch.device, memory_plan.MemoryPlan]  # of this process

    @property
    def planned(self) -> int:
        """Bytes, on all devices of this process."""
        return sum(plan.total for plan in self.plans.values())


def set_up(cfg: RunConfig, places: Placement) -> Setup:
    """Check what can be checked without a video. Raises UserError."""
    pruner, drafter, verifier = (registry.build(kind, getattr(cfg, kind)) for kind in ("pruner", "drafter", "verifier"))
    target = skeleton(model_folder(cfg.target.path), cfg.mrope)
    target.check_template()
    draft = skeleton(model_folder(cfg.draft.path), cfg.mrope) if drafter.model == "draft" else None
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
        with settled():  # a property may read files of its own
            needs_of(strategy)
    return setup


def check_reference(cfg: RunConfig, target: VideoLM, kind: str | None) -> None:
    """Raises UserError where Hugging Face's own model is another one than the target."""
    if cfg.check is None:
        return
    wanted = f"check={cfg.check} reads the answer over with Hugging Face's own model"
    if kind:
        raise UserError(f"{wanted}, and target.weights={kind} makes another of it: leave target.weights out, or check")
    if target.quantised:
        raise UserError(f"{wanted}, which is not done for checkpoints quantised by {target.quantised}: leave check out")
    if cfg.target.parallel == "tensor":
        raise UserError(f"{wanted}, for which ranks have no room: take target.parallel=layers, or leave check out")
    if cfg.mrope != "hf" and target.axes > 1:
        raise UserError(f"{wanted}, whose positions are other ones than mrope={cfg.mrope}: take mrope=hf, or leave check out")


def own_sample(cfg: RunConfig) -> Sample:
    """The configuration's own video and question, where it names no data set."""
    return Sample("", find_clip(cfg.video), cfg.question or "describe the video.")


def read(setup: Setup, sample: Sample) -> Reading:
    """Open the video and make the prompt. Raises UserError."""
    check_question(sample.question)
    start = perf_counter()
    clip = frames_of(setup.cfg, setup.target, sample)
    prompt = setup.target.prompt(sample.question, [clip], max_pixels=setup.cfg.max_pixels)
    name = clip.source if callable(sample.video) else sample.video.name
    pixels = sum(part.nbytes for video in prompt.videos for part in video.values() if isinstance(part, torch.Tensor))
    return Reading(prompt, name, sample.question, perf_counter() - start, clip.frames.nbytes + pixels, clip.reader)


def reads_ahead(cfg: RunConfig, places: Placement) -> bool:
    """Is the next sample's video read while one is decoded? On a CPU it would take its time from the decoding."""
    if cfg.dataset is None:
        return False
    return places.first.type == "cuda" if cfg.prefetch == "auto" else bool(cfg.prefetch)


def check_question(question: object) -> None:
    """Raises UserError for what is no text, or more of it than a question has."""
    if not isinstance(question, str) or SURROGATE.search(question):
        raise UserError(f"the question is no text: {line(repr(question))}")
    if len(question) > LONGEST_QUESTION:
        raise UserError(f"the question has {len(question)} characters, at most {LONGEST_QUESTION} are asked")


def check_name(path: Path) -> None:
    """Raises MissingVideo for what no file can be called; one that is not there is missed when it is opened."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise MissingVideo(f"no such file: {path} ({getattr(error, 'strerror', None) or 'not a name'})") from None


def frames_of(cfg: RunConfig, target: VideoLM, sample: Sample) -> Clip:
    """Those of its video that the target is shown. Raises UserError."""
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
    """Room for the request. held: bytes on each device that it would use again, of what was loaded before it; layers: of each
    device, where a target is held that is split. Raises UserError where there is not enough.
    """
    cfg, places, drafter, prompt = setup.cfg, setup.places, setup.drafter, reading.prompt
    target, draft = setup.target, setup.draft
    nodes, rows = sizes_of(drafter)
    slots = len(prompt) + cfg.max_new_tokens + nodes
    kept = setup.graph().budget(prompt)
    drafts = {"draft": draft, "target": target, None: None}[drafter.model]
    patches = max(map(target.vision_rows, prompt.videos), default=0)
    pruned = slots - len(prompt.video_index) + kept + rows - nodes
    if setup.pruner.draft_layers and 0 < kept < len(prompt.video_index):
        pruned = max(pruned, len(prompt))  # its signal comes from the drafter's pass over the whole prompt
    asked, total = needs_of(setup.pruner) | needs_of(drafter), len(prompt.video_index)
    signals = held_bytes(asked, setup.verifier.reads_hidden, target, total, setup.dtype, places.ranks)
    needs = [memory_plan.Need(target, slots, setup.dtype, setup.kinds["target"], signals)]
    if drafts is not None:
        kind = setup.kinds.get("draft", setup.kinds["target"])
        needs.append(memory_plan.Need(drafts, pruned, dtype_of(drafts, cfg.dtype), kind))
    free = {device: memory_plan.free_bytes(device) + (held or {}).get(device, 0) for device in places.devices}
    plans, counts = memory_plan.plan(needs[0], needs[1] if needs[1:] else None, patches, places, free, layers)
    if reads_ahead(cfg, places):
        host = torch.device("cpu")
        parts = plans[host].parts if host in plans else {}
        plans[host] = memory_plan.MemoryPlan(parts | {"the next video": reading.read_bytes})
        free.setdefault(host, memory_plan.free_bytes(host))
    for device, planned in plans.items():
        have = free[device]
        if planned.total > have:
            advice = f"{SMALLER}, or more GPUs" if places.parallel else SMALLER
            needed = f"{planned.total / 2**30:.1f} GiB on {device}"
            raise UserError(f"the run needs about {needed}, {have / 2**30:.1f} GiB are free: {advice}")
    return Prepared(**vars(setup), **vars(reading), kept=kept, layers=counts, plans=plans)
