"""Fit static trees to the embedded pairs: ranks of a wide tree on scenes that are not those of the evaluation.

    python -m experiments.strategies.fit --workers 2

Writes results/<family>_fitted_tree.json (25 nodes, no deeper than the paper's tree, so that a round costs the same) and
results/<family>_fitted_tree_8.json (25 nodes, at most eight levels), at `uniform`, ratio 0.9. Each is recorded with a tree as
deep as itself: where rounds begin goes by how far the one before came.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.embedded_pair.evaluate import FAMILIES, scene_request
from experiments.strategies.evaluate import LIMIT, Pair
from experiments.strategies.settings import FITTED, RATIO, RESULTS, tree_file
from specvlm.decoding.loop import DecodingGraph
from specvlm.fit_tree.__main__ import Round, best_tree, expected, fit_ranks
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import PAPER_TREE, GenerationOptions

FIRST = 1000  # scene numbers, far from those of the evaluation
WIDE = {5: "4x4x3x3x2", 8: "4x3x3x2x2x2x1x1"}
NODES = 25


_pair: Pair | None = None


def _start(family: str) -> None:
    global _pair
    torch.set_num_threads(1)
    _pair = Pair(family, "cpu")


@torch.inference_mode()
def recorded(job: tuple[int, str]) -> list[Round]:
    """The rounds of a real decode of a scene with a wide tree."""
    (number, wide), pair = job, _pair
    assert pair is not None
    prompt, _ = scene_request(pair.target, pair.family, "caption", number)
    graph = DecodingGraph(
        pair.target, pair.draft, UniformPruner(), TreeDrafter(wide), GreedyVerifier(), GenerationOptions(ratio=RATIO)
    )
    return [Round(step.ranks, step.widths) for step in graph.decode(prompt, LIMIT) if step.widths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = range(FIRST, FIRST + args.scenes)
    for family in FAMILIES:
        with ProcessPoolExecutor(args.workers, get_context("spawn"), _start, (family,)) as pool:
            runs = {depth: list(pool.map(recorded, [(number, wide) for number in numbers])) for depth, wide in WIDE.items()}
        for name, depth in zip(FITTED, WIDE, strict=True):
            rounds = [one for run in runs[depth] for one in run]
            chances = fit_ranks(rounds)
            paths = best_tree(chances, NODES, depth)
            (args.out / tree_file(family, name).name).write_text(json.dumps(paths) + "\n")
            by_depth = [sum(len(path) == level for path in paths) for level in range(1, depth + 1)]
            ours, paper = expected(paths, chances), expected(PAPER_TREE, chances)
            said = f"{ours:.2f} expected on the scenes it was fitted to, the paper's {paper:.2f}"
            print(f"{family} {name}: {len(rounds)} rounds, {'/'.join(map(str, by_depth))} guesses by depth, {said}", flush=True)


if __name__ == "__main__":
    main()
