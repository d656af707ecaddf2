"""Time the draft's start on a GPU of its own: after the target's prefill, and beside it.

    python -m experiments.overlap.start --draft-device cuda:1

Models have the released shapes and random weights. For each pruner, one line: the target's prefill alone, the time from
the first token to the draft being ready in both orders, and what the first token takes in both. The tokens are compared
too. Rows are appended to starts.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from experiments.gpu_pair.measure import timed
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, pair_of, prompt_of
from experiments.strategies.settings import pruners
from specvlm.decoding import early_start
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import engine_for
from specvlm.models.memory_plan import peak_bytes, reset_peak
from specvlm.models.placement import device_of
from specvlm.results.metrics import speed, tokens_of
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, Step

HERE = Path(__file__).parent
TOKENS = 4  # of each answer, besides the limit for which caches are sized


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments/gpu_pair/shapes.py")
    made.add_argument("--video-tokens", type=int, default=16384)
    made.add_argument("--pruners", default="uniform,fastv,uv_prune,two_stage")
    made.add_argument("--ratio", type=float, default=0.9)
    made.add_argument("--draft-weights", default="bf16")
    made.add_argument("--target-weights", default="bf16")
    made.add_argument("--device", default="auto")
    made.add_argument("--draft-device", default="cuda:1")
    made.add_argument("--repeats", type=int, default=1, help="runs of each order; medians count")
    made.add_argument("--limit-s", type=float, default=85, help="pruners not started by then are left out")
    made.add_argument("--out", type=Path, default=HERE / "starts.jsonl")
    return made


@contextmanager
def order(beside: bool) -> Iterator[None]:
    """Let drafts start beside the target's prefill in this block, or after it."""
    rule = early_start.has_own_gpu
    early_start.has_own_gpu = lambda draft, target: beside
    try:
        yield
    finally:
        early_start.has_own_gpu = rule


def figures(steps: list[Step]) -> dict[str, float]:
    """Return the seconds to the first token, and from there to the draft being ready."""
    times: dict[str, float] = {}
    for step in steps[:2]:
        times |= step.times_s
    return {key: speed(times, 2)[key] for key in ("time_to_first_token_s", "drafter_start_s")}


def started(graph: DecodingGraph, prompt: Any, beside: bool, repeats: int) -> dict[str, Any]:
    """Time a draft's start in one of the two orders."""
    devices = {graph.target.device, graph.draft.device} if graph.draft else {graph.target.device}
    for device in devices:
        reset_peak(device)
    found, tokens = [], list[int]()
    for _ in range(repeats):
        with order(beside):
            steps = graph.decode(prompt)
            _, seen = timed(islice(steps, TOKENS))
            steps.close()  # type: ignore[attr-defined]
        found.append(figures(seen))
        tokens = tokens_of(seen)
    middle = {key: median(one[key] for one in found) for key in found[0]}
    return middle | {"tokens": tokens, "peaks_gib": [peak_bytes(device) / 2**30 for device in sorted(devices, key=str)]}


@torch.no_grad()
def main() -> None:
    options, begun = parser().parse_args(), perf_counter()
    device, draft_device = device_of(options.device), device_of(options.draft_device)
    shapes, dtype = pair_of(options.shape), torch.bfloat16 if device.type == "cuda" else torch.float32
    assert shapes.draft is not None
    target = build(shapes.target, wrap_of(shapes.target.family), device, dtype, options.target_weights, 0)
    draft = build(shapes.draft, wrap_of(shapes.draft.family), draft_device, dtype, options.draft_weights, 1)
    prompt, engine = prompt_of(target, shapes.target, options.video_tokens, True), engine_for("auto", device)
    asked, greedy = GenerationOptions(64, options.ratio), GreedyVerifier()
    graphs = {
        name: DecodingGraph(target, draft, pruners()[name], OverlapDrafter("chain:5"), greedy, asked, engine=engine)
        for name in options.pruners.split(",")
    }
    caches = next(iter(graphs.values())).caches
    for graph in graphs.values():
        graph.caches = caches
    print(f"{perf_counter() - begun:6.1f} s  models are built", flush=True)
    started(next(iter(graphs.values())), prompt, True, 1)  # captures and compiles
    _, seen = timed(islice(autoregressive(target, prompt, asked, greedy, caches, engine), TOKENS))
    alone = sum(seen[0].times_s[part] for part in ("embed", "prefill"))
    for name, graph in graphs.items():
        if perf_counter() - begun > options.limit_s:
            print(f"{name}: left out", flush=True)
            continue
        after, beside = (started(graph, prompt, way, options.repeats) for way in (False, True))
        same = tokens_of(seen)[: len(after["tokens"])] == after["tokens"][: len(tokens_of(seen))]
        row = {"pruner": name, "prefill_alone_s": alone, "after": after, "beside": beside}
        row |= {"same_tokens": same and after["tokens"] == beside["tokens"], "video_tokens": options.video_tokens}
        row |= {"shape": options.shape, "ratio": options.ratio, "machine": _name(device)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row, perf_counter() - begun), flush=True)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def line(row: dict[str, Any], at: float) -> str:
    """Describe a row in a line."""
    after, beside = row["after"], row["beside"]
    ways = [
        f"{1000 * one['drafter_start_s']:.0f} ms (first token {one['time_to_first_token_s']:.3f} s)" for one in (after, beside)
    ]
    peaks = " / ".join(f"{a:.2f} -> {b:.2f}" for a, b in zip(after["peaks_gib"], beside["peaks_gib"], strict=True))
    tokens = "same tokens" if row["same_tokens"] else "OTHER TOKENS"
    start = f"{at:6.1f} s  {row['pruner']}: prefill alone {row['prefill_alone_s']:.3f} s"
    return f"{start}; draft ready {ways[0]} after, {ways[1]} beside; peaks {peaks} GiB; {tokens}"


if __name__ == "__main__":
    main()
