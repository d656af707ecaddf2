"""Fit a static tree to recorded runs: python -m specvlm.fit_tree RUN_FOLDER... [--nodes 25] [--depth 5] [--out tree.json]

    python -m specvlm drafter.shape=4x3x3x2 ...                  # record: a wide tree sees more ranks than a narrow one
    python -m specvlm.fit_tree outputs/run outputs/another
    python -m specvlm drafter=tree drafter.shape=tree.json ...

Each round of a steps.jsonl tells, level by level, which of the draft's guesses the target took (`ranks`), and how many were
tried (`widths`): beyond those the rank is unknown. From these comes p(rank r at depth d | all above accepted), by the
product-limit estimator, in which a round counts for a rank only where that rank was tried (Kaplan and Meier, 1958). Ranks at
different depths are taken as independent of each other; then a node is reached with the product over its way, a tree accepts
the sum over its nodes in expectation, and the best tree of M nodes is the M most probable ones: greedy is optimal, since none
is more probable than its parent. What was never tried counts as never taken, so a tree grows only where runs looked.

Whether the fit is worth anything is judged on runs that it has not seen: every second folder, or every second round of a single
run, is held out, a tree is fitted to the rest, and both it and the paper's are valued by what was held out. The tree that is
written is fitted to everything.
"""

if __name__ == "__main__":
    from specvlm.app.terminal import loading

    loading()

import argparse
import heapq
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path

from specvlm.app.cli import print_lines
from specvlm.errors import UserError
from specvlm.parsing.bounds import parse
from specvlm.results.records import Ranked
from specvlm.results.rows import lines_of
from specvlm.types import DEEPEST, MOST_GUESSES, PAPER_TREE, Within

Paths = list[list[int]]


@dataclass(frozen=True)
class Round:
    """ranks: of the accepted guesses, by depth. widths: how many were tried there, and behind the last one."""

    ranks: tuple[int, ...]
    widths: tuple[int, ...]


def read(folder: Path) -> list[Round]:
    """The rounds of a run's folder. Raises UserError where it has none that tell ranks."""
    if not (folder / "steps.jsonl").is_file():
        inner = sorted({file.parent.name for file in folder.glob("*/steps.jsonl")})
        which = f"a sweep: give folders of its jobs, such as {folder / inner[0]}" if inner else "no folder of a run"
        raise UserError(f"{folder} has no steps.jsonl; it is {which}")
    rounds = []
    for row in lines_of(folder / "steps.jsonl", torn=True):
        if "widths" in row:
            parse(Ranked, row, folder / "steps.jsonl")
            rounds.append(Round(tuple(row["ranks"]), tuple(row["widths"])))
    if not rounds:
        raise UserError(f"{folder} tells no ranks: record a run with a tree of best guesses (drafter=tree, verifier=greedy)")
    return rounds


def fit_ranks(rounds: Sequence[Round]) -> list[list[float]]:
    """p[depth][rank]: the chance that the target takes that guess once all above is accepted. Zero where nobody tried."""
    tried, taken = defaultdict[int, Counter[int]](Counter), defaultdict[int, Counter[int]](Counter)
    for one in rounds:
        for depth, width in enumerate(one.widths):
            rank = one.ranks[depth] if depth < len(one.ranks) and one.ranks[depth] < width else None
            tried[depth].update(range(width if rank is None else rank + 1))
            if rank is not None:
                taken[depth][rank] += 1
    chances = []
    for depth in range(len(tried)):
        left, chances_R = 1.0, []
        for rank in range(len(tried[depth])):
            hits, at_risk = taken[depth][rank], tried[depth][rank]
            chances_R.append(left * hits / at_risk)
            left *= 1 - hits / at_risk
        chances.append(chances_R)
    return chances


def best_tree(chances: list[list[float]], nodes: int, depth: int | None = None) -> Paths:
    """The `nodes` most probable ways; equal ones in the order of their ranks, shorter first. Fewer where no other was taken."""
    order = count()
    paths: Paths = []
    heap: list[tuple[float, int, int, list[int]]] = [(-1.0, 0, next(order), [])]
    deepest = min(len(chances), DEEPEST if depth is None else depth)
    while heap and len(paths) <= nodes:
        chance, _, _, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < deepest:
            for rank, p in enumerate(chances[len(path)]):
                if p > 0:
                    heapq.heappush(heap, (chance * p, len(path) + 1, next(order), [*path, rank]))
    return sorted(paths[1:], key=lambda path: (len(path), path))


def expected(paths: Paths, chances: list[list[float]]) -> float:
    """Accepted guesses a round of a tree, in expectation."""
    known = {(depth, rank): chance for depth, row in enumerate(chances) for rank, chance in enumerate(row)}
    return sum((prod(known.get(step, 0.0) for step in enumerate(path)) for path in paths), 0.0)


def split(runs: Sequence[list[Round]]) -> tuple[list[Round], list[Round], str]:
    """What is fitted to, what is held out, and in words how it was split."""
    if len(runs) > 1:
        fitted, held = ([r for run in runs[first::2] for r in run] for first in (0, 1))
        return fitted, held, f"{len(runs) // 2} of {len(runs)} runs"
    return runs[0][::2], runs[0][1::2], "every second round of the only run"


def report(runs: Sequence[list[Round]], tree: Paths, nodes: int, depth: int | None) -> list[str]:
    """What was found, in lines. The last one says whether the fit beats the paper's tree."""
    fitted, held, how = split(runs)
    lines = [f"{sum(map(len, runs))} rounds of {len(runs)} runs; held out: {how} ({len(held)} rounds)"]
    by_depth = [sum(len(path) == d for path in tree) for d in range(1, 1 + max(map(len, tree)))]
    lines.append(f"the tree of all runs: {len(tree)} guesses, {'/'.join(map(str, by_depth))} by depth")
    if not held:
        return [*lines, "nothing could be held out: whether it beats the paper's tree is not known"]
    chances = fit_ranks(held)
    ours, paper = expected(best_tree(fit_ranks(fitted), nodes, depth), chances), expected(PAPER_TREE, chances)
    lines.append(f"accepted a round, expected on what was held out: fitted {ours:.3f}, the paper's tree {paper:.3f}")
    sizes = f" (at {nodes} guesses against {len(PAPER_TREE)})" if nodes != len(PAPER_TREE) else ""
    if ours > paper:
        return [*lines, f"the fit beats the paper's tree{sizes} by {ours - paper:.3f}, as far as ranks are independent"]
    return [*lines, f"the fit does NOT beat the paper's tree{sizes}: use drafter.shape=paper"]


def fit(folders: Sequence[Path], out: Path, nodes: int = 25, depth: int | None = None) -> list[str]:
    """Write the tree, return the report. Raises UserError."""
    for name, value, most in (("nodes", nodes, MOST_GUESSES), ("depth", 1 if depth is None else depth, DEEPEST)):
        if value not in Within(1, most):
            raise UserError(f"{name} must be at least 1, got {value} (at most {most})")
    if out.suffix != ".json":
        raise UserError(f"{out}: a tree file ends in .json, since drafter.shape knows it by that")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent} to write into")
    runs = [read(folder) for folder in folders]
    tree = best_tree(fit_ranks([one for run in runs for one in run]), nodes, depth)
    if not tree:
        raise UserError("no guess was ever accepted in these runs: there is nothing to fit a tree to")
    lines = report(runs, tree, nodes, depth)
    out.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return [*lines, f"written: drafter=tree drafter.shape={out}"]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m specvlm.fit_tree", description="Fit a static tree to recorded runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders with a steps.jsonl")
    parser.add_argument("--nodes", type=int, default=25, help="guesses of the tree (25, as many as the paper's)")
    parser.add_argument("--depth", type=int, help="most levels, each of which is a draft pass (as deep as the runs saw)")
    parser.add_argument("--out", type=Path, default=Path("tree.json"), help="the file to write (tree.json)")
    return print_lines(parser, words, lambda asked: fit(asked.folders, asked.out, asked.nodes, asked.depth))


if __name__ == "__main__":
    sys.exit(main())
