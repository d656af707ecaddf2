"""Answer one request: decode with and without a drafter, compare, and summarise."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from specvlm.app.baselines import Baseline
from specvlm.app.prepare import SMALLER, Prepared
from specvlm.config import RunConfig
from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.errors import OutOfMemory
from specvlm.models import memory_plan
from specvlm.models.load import name_of
from specvlm.results import metrics
from specvlm.strategies.fence import sizes_of
from specvlm.strategies.registry import described
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import Step


@dataclass
class RequestResult:
    """Results of a request so far; kept if the request fails.

    Attributes:
        steps: Steps decoded with the drafter.
        baseline: The complete baseline, or None.
        stage: Current stage, for messages.
        out_of_memory: The stage in which memory ran out, or None.
        peak_bytes: Peak memory in bytes, once measured.
        captured_s: Seconds that the engine had spent on capturing before this request.
        known: Steps of the request, if it was decoded together with others.
        save: Saves the work done before memory ran out and returns a note for the message. By default it saves nothing.
    """

    steps: list[Step] = field(default_factory=list)
    baseline: Baseline | None = None
    stage: str = "loading"
    out_of_memory: str | None = None
    peak_bytes: int | None = None
    captured_s: float = 0.0
    known: Iterator[Step] | None = None
    save: Callable[[], str] = str


def begin(request: Prepared, graph: DecodingGraph, record: RequestResult) -> None:
    """Reserve the target's cache and reset the peak memory.

    The cache is large enough for decoding with and without the drafter, so that graphs captured for it stay valid.
    """
    record.stage = "warming up"
    most = request.cfg.max_new_tokens + sizes_of(graph.drafter)[0]
    graph.caches.reserve("target", graph.target, len(request.prompt) + most)
    for device in request.places.devices:
        memory_plan.reset_peak(device)


def warm_up(steps: Iterator[Step], record: RequestResult, graph: DecodingGraph) -> None:
    """Run the first three steps of a full-length request, so that caches grow and graphs are captured untimed.

    Keeps no prompt, since that would make the timed request that follows faster.
    """
    record.stage = "warming up"
    with frozen(graph):
        list(islice(steps, 3))


def speculate(request: Prepared, graph: DecodingGraph, record: RequestResult) -> Iterator[Step]:
    """Decode with the drafter, unless the steps are known already; record and yield each step."""
    record.stage = "decoding"
    for step in graph.decode(request.prompt) if record.known is None else record.known:
        record.steps.append(step)
        yield step


def decode_alone(request: Prepared, graph: DecodingGraph, record: RequestResult, advance: Callable[[], None]) -> list[Step]:
    """Decode with the target alone. advance: called after each step."""
    record.stage = "decoding without a drafter"
    steps = []
    for step in alone(request, graph):
        steps.append(step)
        advance()
    return steps


def alone(request: Prepared, graph: DecodingGraph) -> Iterator[Step]:
    """Decode with the target alone, by specvlm's own verification rule instead of the configured verifier.

    It uses prompts kept from earlier samples, as the drafted request does, but keeps none itself.
    """
    more = (own_rule(graph.sampling), graph.caches, graph.engine, graph.prefixes)
    with frozen(graph):
        yield from autoregressive(graph.target, request.prompt, graph.options, *more)


def frozen(graph: DecodingGraph) -> AbstractContextManager[None]:
    """Keep requests from adding to the graph's kept prompts, for the length of a block."""
    return nullcontext() if graph.prefixes is None else graph.prefixes.frozen()


def row(number: int, step: Step) -> dict[str, Any]:
    """Format a step as a line of steps.jsonl."""
    fields = {"round": number, "tokens": step.tokens, "drafted": step.drafted, "accepted": step.accepted, "full": step.full}
    kept = {} if step.keep is None else {"kept": step.keep.index.tolist()}
    if step.widths:  # read by `fit_tree`
        fields |= {"ranks": step.ranks, "widths": step.widths}
    if step.ahead is not None:
        fields["ahead"] = step.ahead
    if step.refused:  # read by `report`
        fields["refused"] = step.refused
    return fields | {"times_s": {part: round(seconds, 6) for part, seconds in step.times_s.items()}} | kept


def summarize(request: Prepared, graph: DecodingGraph, record: RequestResult) -> tuple[dict[str, Any], str]:
    """Return the content of summary.json (see `metrics.KEYS`) and the one-word verdict (see `judge`)."""
    steps, baseline = record.steps, record.baseline
    peak = max(map(memory_plan.peak_bytes, request.places.devices)) if record.peak_bytes is None else record.peak_bytes
    verdict, text, difference = judge(request, graph, record)
    tokens = metrics.tokens_of(steps)
    times_s, batch = {"video": request.video_s} | metrics.times_of(steps), request.cfg.batch
    figures = spans(request.video_s, metrics.times_of(steps), len(tokens), baseline)
    if batch > 1:  # the times are also those of other requests
        figures |= dict.fromkeys(metrics.OF_ONE_REQUEST)
        times_s = {"video": request.video_s}
    kept = next((len(step.keep) for step in steps if step.keep is not None), None)
    summary = {
        "verdict": text,
        "text": request.target.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "baseline_token_ids": baseline.tokens if baseline else None,
        "prompt_tokens": len(request.prompt),
        "video_tokens": len(request.prompt.video_index),
        "kept_tokens": kept,
        **metrics.reuse_of(steps),
        "new_tokens": len(tokens),
        **metrics.acceptance_of(steps),
        **figures,
        **metrics.speedups(figures),
        "times_s": times_s,
        "batch": batch,
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
    """Compute the times with the drafter and those of the baseline, which are None without one (see `metrics.KEYS`).

    times_s: seconds by part with the drafter; tokens: number of output tokens.
    """
    alone = metrics.speed(baseline.times_s, len(baseline.tokens), video_s) if baseline else {}
    told = ("decode_s", "end_to_end_s", "file_to_first_token_s", "file_to_last_token_s")
    return metrics.speed(times_s, tokens, video_s) | {f"baseline_{key}": alone.get(key) for key in told}


def judge(request: Prepared, graph: DecodingGraph, record: RequestResult) -> tuple[str, str, dict[str, Any] | None]:
    """Compare the answer with the baseline, unless it is sampled or lossy.

    Returns the verdict in one word, such as "tie"; in full, such as "numeric tie at token 5 (gap 0.1)"; and
    `difference` as `metrics.KEYS` explains it.
    """
    baseline = record.baseline
    if baseline is None or record.out_of_memory:
        return "not checked", "not checked", None
    if not graph.lossless:
        return "lossy", "lossy", None
    if graph.sampling.temperature > 0 and not graph.sampling.coupled:
        return "sampled", "sampled", None
    record.stage = "checking"
    tokens = metrics.tokens_of(record.steps)
    found = lossless.compare(
        graph.target, request.prompt, baseline.tokens, tokens, graph.caches, graph.engine, record.steps, graph.verifier,
        graph.options, graph.sampling,
    )  # fmt: skip
    if found.token is None:
        return found.verdict, str(found), None
    texts = [request.target.tokenizer.decode([token]) for token in found.candidates or ()]
    control = (
        metrics.tokens_of(list(alone(request, graph))) == baseline.tokens
        if found.verdict == "tie" or graph.engine.exact(graph.target)
        else None
    )
    if control is False:  # the target is not deterministic, so nothing follows from a difference
        found = replace(found, verdict="mismatch", reason="the target alone, decoded again, gives another output")
    return found.verdict, str(found), asdict(found) | {"candidate_texts": texts, "control": control}


def hf_check_of(cfg: RunConfig, graph: DecodingGraph) -> str | None:
    """Return `hf_check` of an answer that needs no check; None if the check is still to come (see `hf_check.py`)."""
    if cfg.check is None:
        return "not checked"
    if not graph.lossless:
        return "lossy"
    if graph.sampling.temperature > 0:
        return "not checked: a sampled token need not be the argmax"
    return None


def ran_out(request: Prepared, record: RequestResult, done: str = "") -> OutOfMemory:
    """Build the error for a request that ran out of memory. done: the note of `RequestResult.save`, to add."""
    where, planned = " or ".join(map(str, request.places.devices)), f"{request.planned / 2**30:.1f} GiB"
    return OutOfMemory(f"{where} ran out of memory while {record.stage}, though {planned} were planned: {SMALLER}{done}")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads within the context; None leaves it unchanged."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
