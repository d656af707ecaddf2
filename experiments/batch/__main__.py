"""Measure many requests in one pass, with random weights of published shapes and given acceptance, on one GPU.

Each request has its own context and its own caches, filled with random numbers. How many guesses are accepted is drawn
per request and round. Baseline: as many requests, joined too, by the target alone.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from experiments.batch.drafter import ChanceDrafter
from experiments.gpu_pair.__main__ import commit_of
from experiments.gpu_pair.measure import copy_bandwidth, kv_bytes, synchronize, weight_bytes
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, pair_of, prompt_of
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.scheduler import Decoding, Scheduler, Ticket
from specvlm.engine import Engine, engine_for
from specvlm.models import memory_plan
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

OUT = Path(__file__).with_name("results.jsonl")
WARM = 4  # rounds of all requests that are not measured


@dataclass
class Bench:
    """One pair and one engine.

    Attributes:
        target: Target model.
        draft: Draft model.
        engine: Engine that runs the passes.
        rounds: Measured rounds.
        caches: Caches, kept between measurements.
        known: Each prompt's answer by the target, by number of the request.
    """

    target: VideoLM
    draft: VideoLM
    engine: Engine
    rounds: int
    caches: CachePool = field(default_factory=CachePool)
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def alone(self, prompt: VideoPrompt, limit: int) -> Decoding:
        """Decode by the target alone."""
        return autoregressive_work(self.target, prompt, limit, GreedyVerifier(), self.caches, self.engine)

    def speculative(self, number: int, prompt: VideoPrompt, limit: int, tree: str, ratio: float, chance: float) -> Decoding:
        """Decode with guesses that are right by chance."""
        graph = DecodingGraph(
            self.target,
            self.draft,
            UniformPruner(),
            ChanceDrafter(TreeDrafter(tree), self.known[number], accepted=0.0, chance=chance),
            GreedyVerifier(),
            caches=self.caches,
            engine=self.engine,
        )
        return graph.work(prompt, GenerationOptions(max_new_tokens=limit, ratio=ratio, seed=number))

    def run(self, works: Sequence[Decoding], rounds: int) -> dict[str, Any]:
        """Run requests for some rounds beyond the first ones; return times, tokens and passes per round."""
        scheduler = Scheduler(self.engine)
        tickets = [scheduler.submit(work) for work in works]
        counted, walls, tokens = dict[int, list[int]](), list[float](), list[int]()
        while len(walls) < rounds + WARM:
            before = perf_counter()
            found = one_round(scheduler, tickets, counted)
            walls.append(perf_counter() - before)
            tokens.append(found)
        for ticket in reversed(tickets):  # the pool gives the last cache first: each request gets its own again
            scheduler.cancel(ticket)
        kept, made = walls[WARM:], sum(tokens[WARM:])
        return {
            "round_ms": 1000 * median(kept),
            "mean_round_ms": 1000 * sum(kept) / len(kept),
            "tokens_per_s": made / sum(kept),
            "tokens_a_round": made / len(kept) / len(works),
            "ms_per_token": 1000 * sum(kept) * len(works) / made,
            "rounds": len(kept),
            "answers": counted,
        }


def one_round(scheduler: Scheduler, tickets: Sequence[Ticket], counted: dict[int, list[int]]) -> int:
    """Take turns until each request has made a step. Returns the number of new tokens."""
    made, waiting = 0, set(range(len(tickets)))
    while waiting:
        scheduler.turn()
        for number, ticket in enumerate(tickets):
            if ticket.error is not None:
                raise ticket.error
            while ticket.steps:
                step = ticket.steps.popleft()
                counted.setdefault(number, []).extend(step.tokens)
                made += len(step.tokens)
                waiting.discard(number)
    return made


def passes_of(engine: Engine, requests: int) -> dict[str, float]:
    """Time captured joined passes of so many requests, whose caches still exist, on the device alone: ms by shape."""
    found = {}
    for key, (owner, program) in getattr(engine, "_programs", {}).items():
        if key[0] != "batch" or key[2] != 1 << (requests - 1).bit_length() or program.graph is None:
            continue
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            program.graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        layers = len(owner().layers)
        found[f"{layers} layers, {key[1]} rows, {key[2]} requests"] = round(median(times), 3)
    return found


def measured(bench: Bench, prompts: Sequence[VideoPrompt], args: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """Measure a number of requests: by the target alone, then with each tree and ratio."""
    rows, count, target = list[dict[str, Any]](), len(prompts), bench.target
    depth = max(TreeDrafter(tree).fixed.depth for tree in args.trees)
    limit = (args.rounds + WARM + 2) * (depth + 1) + 2
    most = max(TreeDrafter(tree).max_nodes for tree in args.trees)
    # A cache for each request, as large as the largest tree needs, so that none is replaced.
    held = [bench.caches.take("target", target, len(prompt) + limit + most) for prompt in prompts]
    for cache in held:
        bench.caches.give_back("target", cache)
    alone = bench.run([bench.alone(prompt, limit) for prompt in prompts], limit - WARM - 2)
    bench.known = {number: tuple(answer) for number, answer in alone.pop("answers").items()}
    bytes_read = weight_bytes(target) + sum(kv_bytes(target, len(prompt)) for prompt in prompts)
    floor = {"floor_ms": 1000 * bytes_read / bandwidth}
    rows.append({"part": "alone", "requests": count, **alone, **floor, "over_floor": alone["round_ms"] / floor["floor_ms"]})
    for tree in args.trees:
        for ratio in args.ratios:
            works = [
                bench.speculative(number, prompt, limit, tree, ratio, args.chance) for number, prompt in enumerate(prompts)
            ]
            spent = bench.engine.capture_s
            found = bench.run(works, args.rounds)
            same = all(list(bench.known[n][: len(answer)]) == answer for n, answer in found.pop("answers").items())
            against = {"against_alone": found["tokens_per_s"] / alone["tokens_per_s"], "same_tokens": same}
            spent = bench.engine.capture_s - spent
            rows.append(
                {"part": "speculative", "requests": count, "tree": tree, "ratio": ratio, **found, **against, "capture_s": spent}
            )
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """Write a row's main figures in a line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.batch", description=__doc__)
    parser.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments.gpu_pair (default: %(default)s)")
    parser.add_argument("--requests", default="1,8", help="numbers of requests, with commas (default: %(default)s)")
    parser.add_argument(
        "--video-tokens", default="16384", help="video tokens; several with commas go round (default: %(default)s)"
    )
    parser.add_argument("--ratios", default="0.9,0", help="shares of the video tokens to drop (default: %(default)s)")
    parser.add_argument("--trees", default="chain:4,chain:5", help="trees to draft (default: %(default)s)")
    parser.add_argument("--chance", type=float, default=0.8, help="chance that a guess is right (default: %(default)s)")
    parser.add_argument("--draft-weights", default="bf16", help="bf16, fp8, int8 or int4 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds (default: %(default)s)")
    parser.add_argument("--commit", default="", help="if git is not available")
    parser.add_argument("--out", type=Path, default=OUT, help="file to append a line of JSON per row to")
    args = parser.parse_args(words)
    args.ratios, args.trees = [float(r) for r in args.ratios.split(",")], args.trees.split(",")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pair = pair_of(args.shape)
    assert pair.draft is not None
    bandwidth = copy_bandwidth(device)["gb_per_s"] * 1e9
    with torch.inference_mode():
        models = [
            build(shape, wrap_of(shape.family), device, dtype, weights)
            for shape, weights in ((pair.target, "bf16"), (pair.draft, args.draft_weights))
        ]
    engine = engine_for("auto", device)
    about = {
        "shape": args.shape,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
        "weights": "random weights of the true shapes",
        "acceptance": f"given: each guess right with probability {args.chance}",
        "video_tokens": args.video_tokens,
        "draft_weights": args.draft_weights,
        "gb_per_s": round(bandwidth / 1e9),
    }
    sizes = [int(tokens) for tokens in args.video_tokens.split(",")]
    for count in map(int, args.requests.split(",")):
        prompts = [prompt_of(models[0], pair.target, sizes[number % len(sizes)], False, number) for number in range(count)]
        bench = Bench(*models, engine, args.rounds)
        for row in measured(bench, prompts, args, bandwidth):
            with args.out.open("a") as file:
                file.write(json.dumps(about | {"peak_gib": memory_plan.peak_bytes(device) / 2**30} | row) + "\n")
        print(json.dumps(passes_of(engine, count)))
        bench.caches.empty()
        gc.collect()
    synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
