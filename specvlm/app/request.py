"""One request answered: decoded with a drafter, decoded without, compared, and told in figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from specvlm.app import memory_plan
from specvlm.app.baselines import Baseline
from specvlm.app.prepare import SMALLER, Prepared
from specvlm.config import RunConfig
from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.errors import OutOfMemory
from specvlm.models.load import name_of
from specvlm.results import metrics
from specvlm.strategies.fence import sizes_of
from specvlm.strategies.registry import described
from specvlm.strategies.verifiers.sampling import own_rule
from specvlm.types import Step


@dataclass
class RequestResult:
    """What a request has brought forth so far; outlives one that fails. captured_s: spent on capturing before it."""

    steps: list[Step] = field(default_factory=list)
    baseline: Baseline | None = None  # whole, or not there
    stage: str = "loading"
    out_of_memory: str | None = None
    peak_bytes: int | None = None
    captured_s: float = 0.0
    save: Callable[[], str] = str  # writes what was done before memory ran out, once there is something to be saved


def begin(request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
    """Make room for both decodes, so that the second moves nothing captured for the first. Starts to watch memory."""
    record.stage = "warming up"
    most = request.cfg.max_new_tokens + sizes_of(graph.drafter)[0]
    graph.caches.reserve("target", graph.target, len(request.prompt) + most)
    for device in request.places.devices:
        memory_plan.reset_peak(device)


def warm_up(steps: Iterator[Step], record: RequestResult) -> None:
    """A request of the full length, broken off: what it grows and captures is what the real one will use."""
    record.stage = "warming up"
    list(islice(steps, 3))


def speculate(request: Prepared, graph: DecodingGraph, record: RequestResult) -> Iterator[Step]:
    """The steps, as they come."""
    record.stage = "decoding"
    for step in graph.decode(request.prompt):
        record.steps.append(step)
        yield step


def decode_alone(request: Prepared, graph: DecodingGraph, record: RequestResult, advance: Callable[[], None]) -> list[Step]:
    """The target's own answer."""
    record.stage = "decoding without a drafter"
    steps = []
    for step in alone(request, graph):
        steps.append(step)
        advance()
    return steps


def alone(request: Prepared, graph: DecodingGraph) -> Iterator[Step]:
    """Under specvlm's own rule, whatever the one that is tried says."""
    return autoregressive(graph.target, request.prompt, graph.options, own_rule(graph.sampling), graph.caches, graph.engine)


def row(number: int, step: Step) -> dict[str, Any]:
    """A line of steps.jsonl."""
    fields = {"round": number, "tokens": step.tokens, "drafted": step.drafted, "accepted": step.accepted, "full": step.full}
    kept = {} if step.keep is None else {"kept": step.keep.index.tolist()}
    if step.widths:  # see `fit_tree`
        fields |= {"ranks": step.ranks, "widths": step.widths}
    if step.refused:  # see `report`
        fields["refused"] = step.refused
    return fields | {"times_s": {part: round(seconds, 6) for part, seconds in step.times_s.items()}} | kept


def summarize(request: Prepared, graph: DecodingGraph, record: RequestResult) -> tuple[dict[str, Any], str]:
    """The content of summary.json (see metrics.KEYS) and the bare verdict."""
    steps, baseline = record.steps, record.baseline
    peak = max(map(memory_plan.peak_bytes, request.places.devices)) if record.peak_bytes is None else record.peak_bytes
    verdict, text, difference = judge(request, graph, record)
    tokens = metrics.tokens_of(steps)
    figures = spans(request.video_s, metrics.times_of(steps), len(tokens), baseline)
    kept = next((len(step.keep) for step in steps if step.keep is not None), None)
    summary = {
        "verdict": text,
        "text": request.target.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "baseline_token_ids": baseline.tokens if baseline else None,
        "prompt_tokens": len(request.prompt),
        "video_tokens": len(request.prompt.video_index),
        "kept_tokens": kept,
        "new_tokens": len(tokens),
        **metrics.acceptance_of(steps),
        **figures,
        **metrics.speedups(figures),
        "times_s": {"video": request.video_s} | metrics.times_of(steps),
        "reader": request.reader,
        "peak_memory_bytes": peak,
        "difference": difference,
        "hf_check": "not checked" if record.out_of_memory else hf_check_of(request.cfg, graph),
        "hf_difference": None,
        "out_of_memory": record.out_of_memory,
        "engine": {side: graph.engine.runs(getattr(graph, side)) for side in request.kinds},
        "capture_s": graph.engine.capture_s - record.captured_s,
        "parallel": request.places.parallel,
        "devices": request.places.ranks * len(request.places.target),
        "weights": {side: kind or name_of(getattr(graph, side).dtype) for side, kind in request.kinds.items()},
        "strategies": {kind: described(getattr(graph, kind)) for kind in ("pruner", "drafter", "verifier")},
        "versions": metrics.versions(),
    }
    assert set(summary) == set(metrics.KEYS)
    return summary, verdict


def spans(video_s: float, times_s: dict[str, float], tokens: int, baseline: Baseline | None) -> dict[str, Any]:
    """What the whole took and its parts, with a drafter and, where there is a baseline, without."""
    alone = metrics.speed(baseline.times_s, len(baseline.tokens), video_s) if baseline else {}
    told = ("decode_s", "end_to_end_s", "file_to_first_token_s", "file_to_last_token_s")
    return metrics.speed(times_s, tokens, video_s) | {f"baseline_{key}": alone.get(key) for key in told}


def judge(request: Prepared, graph: DecodingGraph, record: RequestResult) -> tuple[str, str, dict[str, Any] | None]:
    """Is the answer the target's own? The bare verdict, how it is told, and the first difference."""
    baseline = record.baseline
    if baseline is None or record.out_of_memory:
        return "not checked", "not checked", None
    if not graph.lossless:
        return "lossy", "lossy", None
    if graph.sampling.temperature > 0:
        return "sampled", "sampled", None
    record.stage = "checking"
    tokens = metrics.tokens_of(record.steps)
    found = lossless.compare(
        graph.target, request.prompt, baseline.tokens, tokens, graph.caches, graph.engine, record.steps, graph.verifier,
        graph.options,
    )  # fmt: skip
    if found.token is None:
        return found.verdict, str(found), None
    texts = [request.target.tokenizer.decode([token]) for token in found.candidates or ()]
    control = metrics.tokens_of(list(alone(request, graph))) == baseline.tokens if found.verdict == "tie" else None
    if control is False:  # then nothing is known of how its passes round
        found = replace(found, verdict="mismatch", reason="the target alone, decoded again, gives another output")
    return found.verdict, str(found), asdict(found) | {"candidate_texts": texts, "control": control}


def hf_check_of(cfg: RunConfig, graph: DecodingGraph) -> str | None:
    """What is known of `hf_check` before anything is checked; None where that is to come, see `hf_check.py`."""
    if cfg.check is None:
        return "not checked"
    if not graph.lossless:
        return "lossy"
    if graph.sampling.temperature > 0:
        return "not checked: what is sampled need not be the argmax"
    return None


def ran_out(request: Prepared, record: RequestResult, done: str = "") -> OutOfMemory:
    where, planned = " or ".join(map(str, request.places.devices)), f"{request.planned / 2**30:.1f} GiB"
    return OutOfMemory(f"{where} ran out of memory while {record.stage}, though {planned} were planned: {SMALLER}{done}")


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
