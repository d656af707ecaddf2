"""Tokens per second of the processor of several requests at once, with the embedded pair in float32 on one thread.

Requests are held-out caption scenes. Each count of requests decodes the same scenes, so many at a time, by the target
alone, with a fixed chain, and with `shape=auto`. Decoding begins when all requests of a group have their first round
behind them; prefills are not counted. Orders rotate. A row has the processor time of all groups.

    python -m experiments.embedded_pair.together --family qwen2_5_vl --scenes 8
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from experiments.embedded_pair.evaluate import DRAFTS, RESULTS, scene_request
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.scheduler import Decoding, Scheduler
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.models.load import load
from specvlm.results import metrics
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

LIMIT = 128
COUNTS = (1, 2, 4, 8)
METHODS = ("alone", "chain:5", "auto")


class Bench:
    """One pair; the engine and the caches stay, as in a server."""

    def __init__(self, family: str) -> None:
        self.target = load(model_folder(f"embedded:{family}/target"), "float32")
        self.draft = load(model_folder(f"embedded:{family}/plain"), "float32")
        self.engine, self.caches = Engine(), CachePool()

    def work(self, method: str, prompt: VideoPrompt) -> Decoding:
        """Make a request."""
        if method == "alone":
            return autoregressive_work(self.target, prompt, LIMIT, GreedyVerifier(), self.caches, self.engine)
        strategies = TwoStagePruner(), TreeDrafter(method), GreedyVerifier()
        options = GenerationOptions(ratio=0.9)
        graph = DecodingGraph(self.target, self.draft, *strategies, options, caches=self.caches, engine=self.engine)
        return graph.work(prompt, LIMIT)

    def group(self, method: str, prompts: Sequence[VideoPrompt]) -> tuple[float, int, list[list[int]], Counter[int]]:
        """Decode prompts together. Returns processor seconds, tokens counted, all tokens, and guesses of each round."""
        scheduler = Scheduler(self.engine)
        tickets = [scheduler.submit(self.work(method, prompt)) for prompt in prompts]
        with torch.inference_mode():
            while any(len(ticket.steps) < 2 and not ticket.done for ticket in tickets):
                scheduler.turn()
            before, start = sum(len(step.tokens) for ticket in tickets for step in ticket.steps), process_time()
            while scheduler.live:
                scheduler.turn()
            spent = process_time() - start
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        answers = [metrics.tokens_of(list(ticket.steps)) for ticket in tickets]
        drafted = Counter(step.drafted for ticket in tickets for step in list(ticket.steps)[1:])
        return spent, sum(map(len, answers)) - before, answers, drafted


def run(family: str, scenes: int, repeats: int) -> list[dict[str, Any]]:
    bench = Bench(family)
    prompts = [scene_request(bench.target, family, "caption", number)[0] for number in range(scenes)]
    known = [bench.group("alone", [prompt])[2][0] for prompt in prompts]
    for method in METHODS:
        bench.group(method, prompts[: max(COUNTS)])  # warm-up
    times: dict[tuple[str, int], list[float]] = {}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for repeat in range(repeats):
        cells = [(method, count) for count in COUNTS for method in METHODS]
        for method, count in cells[repeat % len(cells) :] + cells[: repeat % len(cells)]:
            found = [bench.group(method, group) for group in (prompts[at : at + count] for at in range(0, scenes, count))]
            spent, made = sum(each[0] for each in found), sum(each[1] for each in found)
            times.setdefault((method, count), []).append(made / spent)
            same = [answer for each in found for answer in each[2]] == known
            drafted = sum((each[3] for each in found), Counter())
            rows[method, count] = {
                "family": family, "method": method, "requests": count, "tokens": made, "same": same,
                "rounds_by_guesses": {str(k): v for k, v in sorted(drafted.items())},
            }  # fmt: skip
            print(method, count, f"{made / spent:.0f}", dict(sorted(drafted.items())), same, flush=True)
    return [row | {"tokens_per_cpu_s": median(times[key]), "of": sorted(times[key])} for key, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=DRAFTS, default="qwen2_5_vl")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {"machine": platform.machine(), "threads": 1, "scenes": args.scenes} | metrics.versions()
    rows = run(args.family, args.scenes, args.repeats)
    path = args.out / f"{args.family}_together.jsonl"
    path.write_text("\n".join(json.dumps(about | row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
