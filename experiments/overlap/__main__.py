"""Time rounds with the draft on a device of its own: without guessing on, and with it.

    python -m experiments.overlap --shape qwen2_5_vl_32b_7b --draft-device cuda:1

Models have the released shapes and random weights; outcomes are given, or replayed from outcomes.jsonl. Rows are
appended to results.jsonl; `python -m experiments.overlap.report` makes the tables. For a target over several GPUs, with
the draft on the next one: --parallel layers, or under torchrun --parallel tensor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from experiments.gpu_pair.__main__ import commit_of
from experiments.gpu_pair.measure import Bench, Counts, Figures, timed
from experiments.gpu_pair.models import wrap_of
from experiments.gpu_pair.shapes import build, model_class, pair_of, prompt_of
from experiments.gpu_pair.spread import skeleton
from experiments.overlap.drafter import Given, GivenOverlapDrafter, GivenTreeDrafter, replayed, spread
from specvlm.advise.overlap import Overlapped
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import engine_for
from specvlm.models.memory_plan import free_bytes
from specvlm.models.partition import Stage, split
from specvlm.models.placement import device_of
from specvlm.models.video_lm import VideoLM
from specvlm.parallel import torchrun
from specvlm.parallel.ranks import SINGLE, ProcessGroup, joined
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions

HERE = Path(__file__).parent
RATIO = 0.9


def numbers(text: str) -> list[float]:
    """Parse numbers with commas between them."""
    return [float(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments/gpu_pair/shapes.py")
    made.add_argument("--video-tokens", type=int, default=16384)
    made.add_argument("--trees", default="chain:4 chain:5 chain:7 paper", help="shapes of trees, with blanks between")
    made.add_argument("--accepted", type=numbers, default=[3.0, 4.0], help="mean guesses accepted per round")
    made.add_argument("--hits", type=numbers, default=[1.0, 0.75, 0.0], help="shares of rounds whose outcome was guessed")
    made.add_argument("--replay", default="", help="FAMILY/PRUNER of outcomes.jsonl, instead of --accepted and --hits")
    made.add_argument("--corrections", type=int, default=2)
    made.add_argument("--draft-weights", default="bf16,fp8")
    made.add_argument("--target-weights", default="bf16")
    made.add_argument("--parallel", default="", choices=["", "layers", "tensor"])
    made.add_argument("--device", default="auto")
    made.add_argument("--draft-device", default="", help="the draft's own device; by default the target's")
    made.add_argument("--ahead", type=int, default=0, help="passes ahead in each round, whatever the check takes; for tests")
    made.add_argument("--engine", default="auto")
    made.add_argument("--hf", action="store_true", help="time Hugging Face's generate too; needs a real prefill")
    made.add_argument("--rounds", type=int, default=80)
    made.add_argument("--warmup", type=int, default=6)
    made.add_argument("--limit-s", type=float, default=280, help="combinations not started by then are left out")
    made.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    return made


@dataclass
class Run:
    """Times all combinations of one target."""

    options: argparse.Namespace
    ranks: ProcessGroup
    device: torch.device
    begun: float

    def late(self) -> bool:
        """Whether the time is over, by rank 0's clock."""
        return self.ranks.share(lambda: perf_counter() - self.begun > self.options.limit_s)

    def add(self, part: str, **figures: Any) -> None:
        """Append a row, on rank 0."""
        if self.ranks.rank:
            return
        asked = {name: getattr(self.options, name) for name in ("shape", "parallel", "target_weights", "video_tokens")}
        row = self.about | asked | {"part": part} | {k: round(v, 4) if type(v) is float else v for k, v in figures.items()}
        print(f"{perf_counter() - self.begun:6.1f} s  {json.dumps({'part': part} | figures, default=str)}", flush=True)
        with self.options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def about(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        return {
            "machine": torch.cuda.get_device_name(self.device) if gpu else "CPU",
            "devices": torch.cuda.device_count() if gpu else 1,
            "commit": commit_of(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    @property
    def draft_device(self) -> torch.device:
        return device_of(self.options.draft_device) if self.options.draft_device else self.device

    def stages(self, layers: int) -> tuple[Stage, ...]:
        """Split a target's layers over all GPUs but the draft's; on the CPU, over two stages."""
        devices = [self.device] * 2
        if self.device.type == "cuda":
            every = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
            devices = [one for one in every if one != self.draft_device]
        room = [float(free_bytes(one)) if one.type == "cuda" else 1.0 for one in devices]
        ends, found = 0, []
        for where, count in zip(devices, split(layers, room), strict=True):
            found.append(Stage(where, ends, ends + count))
            ends += count
        return tuple(found)

    def models(self, weights: str, target: VideoLM | None) -> tuple[VideoLM, VideoLM]:
        """Build the target, unless there is one, and the draft, on rank 0 only."""
        pair, dtype = pair_of(self.options.shape), torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if target is None:
            stages = self.stages(pair.target.text.layers) if self.options.parallel == "layers" else ()
            wrap, more = wrap_of(pair.target.family), (self.options.target_weights, 0, stages, self.ranks)
            target = build(pair.target, wrap, self.device, dtype, *more)
        assert pair.draft is not None
        wrap = wrap_of(pair.draft.family)
        if self.ranks.rank:
            return target, wrap(skeleton(model_class(pair.draft), pair.draft.config()))
        return target, build(pair.draft, wrap, self.draft_device, dtype, weights, 1)

    def outcomes(self, tree: str) -> Iterator[tuple[dict[str, Any], tuple[tuple[int, bool], ...]]]:
        """Yield what rounds come to, with a name."""
        options, count = self.options, self.options.rounds + self.options.warmup
        if options.replay:
            family, _, pruner = options.replay.partition("/")
            rows = [json.loads(line) for line in (HERE / "outcomes.jsonl").read_text().splitlines()]
            mine = [row for row in rows if (row["family"], row["pruner"], row["shape"]) == (family, pruner, tree)]
            if mine:
                yield {"replay": options.replay}, replayed(mine, options.corrections)[:count]
            return
        for accepted in options.accepted:
            if accepted <= TreeDrafter(tree).fixed.depth:
                for hits in options.hits:
                    yield {"accepted": accepted, "hits": hits}, spread(accepted, hits, count)

    def all(self) -> None:
        """Run everything."""
        options, target, engine = self.options, None, engine_for(self.options.engine, self.device)
        trees = options.trees.split()
        largest = f"chain:{max(4, max(TreeDrafter(tree).max_nodes for tree in trees))}"  # sizes the caches only
        known, alone, caches = (), {}, None
        for weights in options.draft_weights.split(","):
            target, draft = self.models(weights, target)
            shape, counts = pair_of(options.shape).target, Counts(options.rounds, options.warmup)
            unread = prompt_of(target, shape, options.video_tokens, False)
            whole = prompt_of(target, shape, options.video_tokens, True) if options.hf else None
            bench = Bench(target, draft, whole, unread, largest, counts, engine, *([caches] if caches else []))
            caches = bench.caches
            bench.limit = 12 + (options.rounds + options.warmup) * (1 + self.most(trees))
            bench.known = known
            if not known:
                if options.hf:
                    bench.start(RATIO, 1)
                alone = bench.autoregressive()
                self.add("autoregressive", **alone)
                if options.hf:
                    hf = bench.hugging_face()
                    hf.pop("tokens")
                    self.add("hf", **hf)
            known = bench.known
            for tree in trees:
                self.tree(bench, tree, weights, alone)
            del draft, bench

    def most(self, trees: list[str]) -> int:
        """Most guesses that rounds accept on average, rounded up."""
        return max(-(-sum(a for a, _ in each) // len(each)) for tree in trees for _, each in self.outcomes(tree))

    def tree(self, bench: Bench, tree: str, weights: str, alone: Figures) -> None:
        """Time one shape of tree."""
        without: dict[float, Figures] = {}
        for name, outcomes in self.outcomes(tree):
            if self.late():
                self.add("left out", tree=tree, draft_weights=weights, **name)
                return
            tags = {"tree": tree, "draft_weights": weights, "corrections": self.options.corrections, **name}
            given, mean = Given(bench.known, outcomes), sum(a for a, _ in outcomes) / len(outcomes)
            if mean not in without:
                without[mean] = self.rounds(bench, GivenTreeDrafter(tree, given=given))
                self.add("without", **tags, **without[mean], against_ours=self.against(alone, without[mean]))
            more = {"corrections": self.options.corrections, "ahead": self.options.ahead}
            figures = self.rounds(bench, GivenOverlapDrafter(tree, given=given, **more))
            base, levels = without[mean], TreeDrafter(tree).fixed.depth
            host = base["ms"] - base["draft_ms"] - base["check_ms"]
            costs = Overlapped(base["draft_ms"] / levels, base["check_ms"], alone["ms_per_token"], host)
            full = sum(a == levels for a, _ in outcomes) / len(outcomes)
            predicted = costs.round_ms(levels, sum(hit for _, hit in outcomes) / len(outcomes), full)
            self.add(
                "with",
                **tags,
                **figures,
                floor_ms=costs.floor_ms(levels, full),
                predicted_ms=predicted,
                predicted_error=predicted / figures["mean_ms"] - 1,
                against_ours=self.against(alone, figures),
                against_without=base["mean_ms"] / figures["mean_ms"],
            )

    def against(self, alone: Figures, figures: Figures) -> float:
        """Return the speed-up over decoding without a draft."""
        return float(alone["ms_per_token"] / figures["ms_per_token"])

    def rounds(self, bench: Bench, drafter: TreeDrafter) -> Figures:
        """Time rounds. The mean counts, since hits and misses differ."""
        graph = DecodingGraph(
            bench.target, bench.draft, UniformPruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=RATIO),
            caches=bench.caches, engine=bench.engine,
        )  # fmt: skip
        wanted, warmup = 1 + self.options.warmup + self.options.rounds, self.options.warmup
        for _ in range(2):  # the first time captures all programs that the outcomes need
            steps = graph.decode(bench.unread, bench.limit)
            walls, seen = timed(islice(steps, wanted))
            steps.close()  # type: ignore[attr-defined]
        tokens = [token for step in seen for token in step.tokens]
        same = tokens == list(bench.known[: len(tokens)])
        walls, seen = walls[1 + warmup :], seen[1 + warmup :]
        found, ahead = fmean(step.accepted for step in seen), [step.ahead for step in seen if step.ahead is not None]
        by = {
            kind: [1000 * w for w, s in zip(walls, seen, strict=True) if s.ahead is not None and bool(s.ahead) == hit]
            for kind, hit in (("hit", True), ("miss", False))
        }
        return {
            "accepted_found": found,
            "ms": 1000 * median(walls),
            "mean_ms": 1000 * fmean(walls),
            "ms_per_token": 1000 * fmean(walls) / (1 + found),
            "draft_ms": 1000 * median(step.times_s["draft"] for step in seen),
            "check_ms": 1000 * median(step.times_s["verify"] for step in seen),
            **{f"{kind}_ms": fmean(walls) if walls else None for kind, walls in by.items()},
            "hits_found": sum(map(bool, ahead)) / len(ahead) if ahead else None,
            "levels_ahead": fmean(filter(None, ahead)) if any(ahead) else None,
            "guessed_on": len(ahead) / len(seen),
            "repeats": len(walls),
            "same_tokens": same,
        }


def main() -> None:
    options = parser().parse_args()
    device = device_of(options.device)
    if torchrun.rank_here():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    run = Run(options, SINGLE, device, perf_counter())
    with torch.no_grad():
        if options.parallel != "tensor":
            run.all()
            return
        if device.type == "cuda":
            run.device = device = torch.device("cuda", torchrun.local_rank())
        with joined(device) as ranks:
            replace(run, ranks=ranks).all()


if __name__ == "__main__":
    main()
