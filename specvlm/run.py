"""One run: read the video, plan the memory, load the pair, decode, prove, report, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from omegaconf import DictConfig

from specvlm import lossless, memory, metrics, registry
from specvlm.config import model_folder
from specvlm.data.clips import find_clip
from specvlm.data.video import probe, read_video
from specvlm.engine import engine_for
from specvlm.errors import OutOfMemory, UserError
from specvlm.folder import files_of, steps_of, write_config, write_json
from specvlm.graph import DecodingGraph, autoregressive
from specvlm.models.load import check_pair, dtype_of, kind_of, load, name_of, skeleton
from specvlm.models.spread import check_shares
from specvlm.places import Places, places_of
from specvlm.ranks import ALONE, Ranks, joined
from specvlm.show import Screen
from specvlm.signals import held_bytes
from specvlm.types import Step, VideoPrompt

OK, MISMATCH = 0, 1
SMALLER = "take fewer frames (frames=…), fewer new tokens (max_new_tokens=…), a smaller dtype or another device"


def run(cfg: DictConfig, folder: Path) -> int:
    """Decode one video as `cfg` says and write the run's folder. Returns 1 on MISMATCH, else 0.

    Raises UserError before anything is written when the input cannot be used. Under torchrun every rank does all of it, and
    the first one alone is heard and writes.
    """
    places, record = places_of(cfg), Record()
    if places.ranks == 1:
        return _run(cfg, folder, places, ALONE, record)
    with joined(places.first, lambda: record.save()) as ranks:
        return _run(cfg, folder if ranks.rank == 0 else None, places, ranks, record)


def _run(cfg: DictConfig, folder: Path | None, places: Places, ranks: Ranks, record: Record) -> int:
    """folder: None for a rank that writes nothing."""
    screen, done = Screen(), ""
    with threads(cfg.threads):
        job = prepare(cfg, places)
        screen.plan(job)
        try:
            graph = assemble(cfg, job, ranks)
            screen.ignored(graph.target.ignored_settings)
            screen.note(graph.engine.note)
            with files_of(folder):
                record.save = lambda: save(cfg, job, graph, folder, record)
                try:
                    decode(cfg, job, graph, folder, screen, record)
                    summary, verdict = summarize(cfg, job, graph, record)
                except RuntimeError as error:
                    done = record.save() if memory.ran_out(error) else ""
                    raise
                if folder:
                    write_json(folder / "summary.json", summary)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            planned = f"{job.planned / 2**30:.1f} GiB"
            where = " or ".join(map(str, places.devices))
            raise OutOfMemory(
                f"{where} ran out of memory while {record.stage}, though {planned} were planned: {SMALLER}{done}"
            ) from error
    if folder:
        screen.summary(summary, folder)
    return MISMATCH if verdict == "mismatch" else OK


def save(cfg: DictConfig, job: Job, graph: DecodingGraph, folder: Path | None, record: Record) -> str:
    """Write what was done before memory ran out, here or on another rank; returns where it is. Computes nothing on a GPU."""
    if folder is None:
        return ""
    record.out_of_memory = record.stage
    write_config(cfg, folder)
    write_json(folder / "summary.json", summarize(cfg, job, graph, record)[0])
    return f"; {len(metrics.tokens_of(record.steps))} tokens are in {folder}"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Of the CPU, for this run alone: the next job of a sweep may ask for another number, or for none."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Record:
    """What a run has brought forth so far. Outlives a run that fails."""

    steps: list[Step] = field(default_factory=list)
    baseline: list[Step] | None = None  # whole, or not there
    stage: str = "loading"
    out_of_memory: str | None = None
    save: Callable[[], str] = str  # see `save`, once there is something to be saved


@dataclass
class Job:
    """What is known before the weights are loaded."""

    pruner: Any
    drafter: Any
    verifier: Any
    prompt: VideoPrompt
    kept: int
    vocabulary: int
    places: Places
    layers: list[int]  # of each device, where they are split
    dtype: torch.dtype
    kinds: dict[str, str | None]  # by side: what its text part is quantised to, None for not at all
    plans: dict[torch.device, memory.MemoryPlan]  # of this process
    clip: str
    question: str
    video_s: float

    @property
    def planned(self) -> int:
        """Bytes, on all devices of this process."""
        return sum(plan.total for plan in self.plans.values())


def prepare(cfg: DictConfig, places: Places) -> Job:
    """Check all input and make the prompt; reads configurations and the video, no weights."""
    pruner, drafter, verifier = (registry.build(kind, cfg[kind]) for kind in ("pruner", "drafter", "verifier"))
    target = skeleton(model_folder(cfg.target.path), cfg.mrope)
    draft = skeleton(model_folder(cfg.draft.path), cfg.mrope) if drafter.model == "draft" else None
    vocabulary = check_pair(target, draft) if draft else target.vocabulary
    if places.ranks > 1:
        check_shares(target.hf.config, places.ranks, "target.parallel=tensor", "take target.parallel=layers")
        if draft and places.draft_shared:
            check_shares(draft.hf.config, places.ranks, "draft.parallel=tensor", "leave draft.parallel out")
    dtype = dtype_of(target, cfg.dtype)
    sides = {side: model for side, model in (("target", target), ("draft", draft)) if model}
    kinds = {s: kind_of(cfg[s].weights, dtype_of(model, cfg.dtype), f"{s}.weights") for s, model in sides.items()}
    start = perf_counter()
    path = find_clip(cfg.video)
    question = cfg.question or "describe the video."
    asked = {"frames": cfg.frames, "fps": cfg.fps}
    sampling = asked if any(asked.values()) else target.sampling(probe(path, cfg.reader))
    prompt = target.prompt(question, [read_video(path, reader=cfg.reader, **sampling)], max_pixels=cfg.max_pixels)
    video_s = perf_counter() - start
    graph = DecodingGraph(target, draft, pruner, drafter, verifier, cfg.ratio, cfg.positions)
    slots = len(prompt) + cfg.max_new_tokens + drafter.max_nodes
    kept = graph.budget(prompt)
    drafts = {"draft": draft, "target": target, None: None}[drafter.model]
    patches = max(map(target.vision_rows, prompt.videos), default=0)
    pruned = slots - len(prompt.video_index) + kept + drafter.max_rows - drafter.max_nodes
    if pruner.draft_layers and 0 < kept < len(prompt.video_index):
        pruned = max(pruned, len(prompt))  # its signal comes from the drafter's pass over the whole prompt
    read = pruner.needs | drafter.needs
    signals = held_bytes(read, verifier.reads_hidden, target, len(prompt.video_index), dtype, places.ranks)
    needs = [memory.Need(target, slots, dtype, kinds["target"], signals)]
    if drafts is not None:
        needs.append(memory.Need(drafts, pruned, dtype_of(drafts, cfg.dtype), kinds.get("draft", kinds["target"])))
    free = {device: memory.free_bytes(device) for device in places.devices}
    plans, layers = memory.plan(needs[0], needs[1] if needs[1:] else None, patches, places, free)
    for device, plan in plans.items():
        have = free[device]
        if have is not None and plan.total > have:
            advice = f"{SMALLER}, or more GPUs" if places.parallel else SMALLER
            raise UserError(
                f"the run needs about {plan.total / 2**30:.1f} GiB on {device}, {have / 2**30:.1f} GiB are free: {advice}"
            )
    strategies = (pruner, drafter, verifier)
    return Job(*strategies, prompt, kept, vocabulary, places, layers, dtype, kinds, plans, path.name, question, video_s)


def assemble(cfg: DictConfig, job: Job, ranks: Ranks) -> DecodingGraph:
    """Load the weights of those models that the drafter needs. A draft that is another rank's is its skeleton here."""
    places, progress = job.places, ranks.rank == 0
    layers = list(zip(job.layers, places.target, strict=True)) if job.layers else []
    options = (cfg.dtype, str(places.first), cfg.mrope)
    target = load(model_folder(cfg.target.path), *options, cfg.target.weights, progress, layers, ranks)
    if cfg.repetition_penalty is not None:
        target.repetition_penalty = cfg.repetition_penalty
    draft = None
    if job.drafter.model == "draft":
        folder, options = model_folder(cfg.draft.path), (cfg.dtype, str(places.draft), cfg.mrope)
        if ranks.rank and not places.draft_shared:
            draft = skeleton(folder, cfg.mrope)
        else:
            shared = ranks if places.draft_shared else ALONE
            draft = load(folder, *options, cfg.draft.weights, progress, ranks=shared)
    if places.first.type == "cuda":
        torch.cuda.set_device(places.first)  # what captures and launches kernels goes by the current device
    engine = engine_for(cfg.engine, places.first)
    strategies = (job.pruner, job.drafter, job.verifier)
    return DecodingGraph(target, draft, *strategies, cfg.ratio, cfg.positions, cfg.seed, job.vocabulary, engine=engine)


def decode(cfg: DictConfig, job: Job, graph: DecodingGraph, folder: Path | None, screen: Screen, record: Record) -> None:
    """Speculative steps, streamed and logged as they come, and the baseline's; both behind a warm-up of each."""

    def alone(limit: int) -> Iterator[Step]:
        return autoregressive(graph.target, job.prompt, limit, job.verifier, cfg.seed, graph.caches, graph.engine)

    record.stage = "warming up"
    with screen.waiting(record.stage):
        # Requests of the full length, broken off: what they grow and capture is what the run will use.
        for warm_up in (graph.decode(job.prompt, cfg.max_new_tokens), alone(cfg.max_new_tokens)):
            list(islice(warm_up, 3))
    for device in job.places.devices:
        memory.reset_peak(device)
    write_config(cfg, folder)
    record.stage = "decoding"
    with steps_of(folder) as log, screen.answer(graph.target.tokenizer) as show:
        for number, step in enumerate(graph.decode(job.prompt, cfg.max_new_tokens)):
            record.steps.append(step)
            log.write(json.dumps(row(number, step)) + "\n")
            log.flush()
            show(step)
    screen.note(next((step.keep.note for step in record.steps if step.keep is not None), ""))
    if not cfg.baseline:
        return
    record.stage = "decoding without a drafter"
    with screen.progress("the target on its own", len(metrics.tokens_of(record.steps))) as advance:
        baseline = []
        for step in alone(cfg.max_new_tokens):
            baseline.append(step)
            advance()
    record.baseline = baseline


def row(number: int, step: Step) -> dict[str, Any]:
    """A line of steps.jsonl."""
    fields = {"round": number, "tokens": step.tokens, "drafted": step.drafted, "accepted": step.accepted, "full": step.full}
    kept = {} if step.keep is None else {"kept": step.keep.index.tolist()}
    if step.widths:  # see `fit_tree`
        fields |= {"ranks": step.ranks, "widths": step.widths}
    return fields | {"times_s": {part: round(seconds, 6) for part, seconds in step.times_s.items()}} | kept


def summarize(cfg: DictConfig, job: Job, graph: DecodingGraph, record: Record) -> tuple[dict[str, Any], str]:
    """The content of summary.json (see metrics.KEYS) and the bare verdict."""
    steps, baseline = record.steps, record.baseline
    tokens, alone = metrics.tokens_of(steps), metrics.tokens_of(baseline or [])
    speed, base = metrics.speed_of(steps), metrics.speed_of(baseline or [])
    difference = None
    if baseline is None or record.out_of_memory:
        verdict = text = "not checked"
    elif not graph.verifier.lossless:
        verdict = text = "lossy"
    elif graph.verifier.sampling.temperature > 0:
        verdict = text = "sampled"
    else:
        record.stage = "checking"
        comparison = lossless.compare(graph.target, job.prompt, alone, tokens, graph.caches, graph.engine)
        verdict, text = comparison.verdict, str(comparison)
        difference = asdict(comparison) if comparison.token is not None else None
    kept = next((len(step.keep) for step in steps if step.keep is not None), None)
    summary = {
        "verdict": text,
        "text": graph.target.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "baseline_token_ids": alone if baseline else None,
        "prompt_tokens": len(job.prompt),
        "video_tokens": len(job.prompt.video_index),
        "kept_tokens": kept,
        "new_tokens": len(tokens),
        **metrics.acceptance_of(steps),
        **speed,
        "baseline_decode_s": base["decode_s"] if baseline else None,
        "baseline_end_to_end_s": base["end_to_end_s"] if baseline else None,
        "speedup_decode": metrics.ratio_of(base["decode_s"], speed["decode_s"]),
        "speedup_end_to_end": metrics.ratio_of(base["end_to_end_s"], speed["end_to_end_s"]),
        "times_s": {"video": job.video_s} | metrics.times_of(steps),
        "peak_memory_bytes": max(memory.peak_bytes(device) for device in job.places.devices),
        "difference": difference,
        "out_of_memory": record.out_of_memory,
        "engine": {side: graph.engine.runs(getattr(graph, side)) for side in job.kinds},
        "capture_s": graph.engine.capture_s,
        "parallel": job.places.parallel,
        "devices": job.places.ranks * len(job.places.target),
        "weights": {side: kind or name_of(getattr(graph, side).dtype) for side, kind in job.kinds.items()},
        "strategies": {kind: repr(getattr(graph, kind)) for kind in ("pruner", "drafter", "verifier")},
        "versions": metrics.versions(),
    }
    assert set(summary) == set(metrics.KEYS)
    return summary, verdict
