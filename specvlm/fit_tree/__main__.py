"""Fit a static tree to recorded runs: python -m specvlm.fit_tree FOLDER... [--nodes 25] [--depth 5] [--out tree.json]

    python -m specvlm drafter.shape=4x3x3x2 ...                  # record: a wide tree sees more ranks than a narrow one
    python -m specvlm.fit_tree outputs/run outputs/another       # or folders of jobs over a data set, or of sweeps
    python -m specvlm drafter=tree drafter.shape=tree.json ...

Each round in steps.jsonl records, per level, the rank of the guess that the target accepted (`ranks`) and the number of
guesses tried (`widths`). Whether the target would have accepted a rank beyond those tried is unknown. The product-limit
estimator (Kaplan and Meier, 1958) gives p(rank r at depth d | all above accepted); a round counts for a rank only if
that rank was tried.

Ranks at different depths are assumed independent. Then the chance that a node is accepted is the product of the chances
along its path, and the expected number of accepted guesses is the sum over all nodes. The best tree of M nodes has the
M most probable nodes. Greedy search finds it, since no node is more probable than its parent. A rank that was never
tried counts as never accepted, so the tree grows only where the runs looked.

The fit is judged on held-out data: every second run or sample, or every second round of a single one. A tree is fitted
to the rest, and its expected acceptance on the held-out part is compared with that of the paper's tree. The tree that
is written is fitted to all data.
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
from specvlm.results.rows import is_job, lines_of, steps_of
from specvlm.types import DEEPEST, MOST_GUESSES, PAPER_TREE, Within

Paths = list[list[int]]  # nodes of a tree, each as the ranks on its path from the root


@dataclass(frozen=True)
class Round:
    """A recorded round.

    Attributes:
        ranks: Rank of the accepted guess at each depth, among the guesses with the same parent, from 0.
        widths: Number of guesses tried at each depth. It has one more entry than `ranks`, for the guesses below the
            last accepted one.
    """

    ranks: tuple[int, ...]
    widths: tuple[int, ...]


def read(folder: Path) -> list[Round]:
    """Read the rounds of all runs in a folder, as one list. Raises UserError as `read_runs` does."""
    return [one for run in read_runs([folder]) for one in run]


def read_runs(folders: Sequence[Path]) -> list[list[Round]]:
    """Read the rounds of each run.

    For jobs over a data set, a run here is one sample with its rounds from all jobs. So when runs are held out, no
    sample is in both parts.

    Args:
        folders: Folders of runs, of jobs over samples, or of sweeps. Jobs of a sweep that record no ranks are left out.

    Raises:
        UserError: A folder has no steps.jsonl, in it or below; a file is damaged; or a folder records no ranks.
    """
    runs = defaultdict[tuple[str, str], list[Round]](list)
    for folder in folders:
        jobs = sorted({file.parent for file in folder.rglob("steps*.jsonl")})
        if not jobs:
            raise UserError(f"{folder} has no steps.jsonl; it is not a folder of a run, a job or a sweep")
        before = len(runs), sum(map(len, runs.values()))
        for job in jobs:
            for key, rounds in ranked(job).items():
                runs[key] += rounds
        if before == (len(runs), sum(map(len, runs.values()))):
            told = "make a run with a tree of best guesses (drafter=tree, verifier=greedy)"
            raise UserError(f"{folder} records no ranks: {told}")
    return list(runs.values())


def ranked(job: Path) -> dict[tuple[str, str], list[Round]]:
    """Read those rounds of a run, or of each sample of a job, that record ranks. Raises UserError for a damaged file.

    Returns:
        Rounds by ("run", folder), or by ("sample", name of the sample).
    """
    if is_job(job):
        lines = {("sample", sample): rows for sample, rows in steps_of(job).items()}
    else:
        lines = {("run", str(job.resolve())): lines_of(job / "steps.jsonl", torn=True)}
    found = {}
    for key, rows in lines.items():
        some = [row for row in rows if "widths" in row]
        for row in some:
            parse(Ranked, row, job / "steps.jsonl")
        if some:
            found[key] = [Round(tuple(row["ranks"]), tuple(row["widths"])) for row in some]
    return found


def fit_ranks(rounds: Sequence[Round]) -> list[list[float]]:
    """Estimate p[depth][rank]: the chance that the target accepts the guess of this rank, if it accepts the parent.

    Ranks that were never tried are left out.
    """
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
    """Build the tree of the `nodes` most probable nodes. It has fewer if no other node has a chance above 0.

    Args:
        chances: From `fit_ranks`.
        nodes: Number of guesses. Of equally probable ones, those nearer to the root come first.
        depth: Maximum number of levels. None: as many as the chances have, up to DEEPEST.
    """
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
    """Compute the expected number of a tree's guesses that are accepted per round. chances: from `fit_ranks`."""
    known = {(depth, rank): chance for depth, row in enumerate(chances) for rank, chance in enumerate(row)}
    return sum((prod(known.get(step, 0.0) for step in enumerate(path)) for path in paths), 0.0)


def split(runs: Sequence[list[Round]]) -> tuple[list[Round], list[Round], str]:
    """Split the rounds: every second run is held out; of a single run, every second round.

    Returns:
        The rounds to fit, the held-out rounds, and a description of the latter for the report.
    """
    if len(runs) > 1:
        fitted, held = ([r for run in runs[first::2] for r in run] for first in (0, 1))
        return fitted, held, f"{len(runs) // 2} of {len(runs)} runs"
    return runs[0][::2], runs[0][1::2], "every second round of the only run"


def report(runs: Sequence[list[Round]], tree: Paths, nodes: int, depth: int | None) -> list[str]:
    """Report the fit as lines of text. The last line says whether the fit beats the paper's tree.

    tree: The tree fitted to all runs. The report also fits one to a part of them and judges it on the rest.
    """
    fitted, held, how = split(runs)
    lines = [f"{sum(map(len, runs))} rounds of {len(runs)} runs; held out: {how} ({len(held)} rounds)"]
    by_depth = [sum(len(path) == d for path in tree) for d in range(1, 1 + max(map(len, tree)))]
    lines.append(f"the tree of all runs: {len(tree)} guesses, {'/'.join(map(str, by_depth))} by depth")
    if not held:
        return [*lines, "too little data to hold any out: unknown whether it beats the paper's tree"]
    chances = fit_ranks(held)
    ours, paper = expected(best_tree(fit_ranks(fitted), nodes, depth), chances), expected(PAPER_TREE, chances)
    lines.append(f"accepted per round, expected on held-out data: fitted {ours:.3f}, the paper's tree {paper:.3f}")
    sizes = f" (at {nodes} guesses against {len(PAPER_TREE)})" if nodes != len(PAPER_TREE) else ""
    if ours > paper:
        return [*lines, f"the fit beats the paper's tree{sizes} by {ours - paper:.3f}, if ranks are independent"]
    return [*lines, f"the fit does NOT beat the paper's tree{sizes}: use drafter.shape=paper"]


def fit(folders: Sequence[Path], out: Path, nodes: int = 25, depth: int | None = None) -> list[str]:
    """Fit a tree to the runs in `folders`, write it to `out`, and return the report.

    Raises UserError if an argument is wrong, a run cannot be read, or no guess was ever accepted.
    """
    for name, value, most in (("nodes", nodes, MOST_GUESSES), ("depth", 1 if depth is None else depth, DEEPEST)):
        if value not in Within(1, most):
            raise UserError(f"{name} must be at least 1, got {value} (at most {most})")
    if out.suffix != ".json":
        raise UserError(f"{out}: a tree file's name ends in .json, so that drafter.shape recognises it")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent} to write into")
    runs = read_runs(folders)
    tree = best_tree(fit_ranks([one for run in runs for one in run]), nodes, depth)
    if not tree:
        raise UserError("no guess was ever accepted in these runs: there is nothing to fit a tree to")
    lines = report(runs, tree, nodes, depth)
    out.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return [*lines, f"written: drafter=tree drafter.shape={out}"]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m specvlm.fit_tree", description="Fit a static tree to recorded runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of runs, jobs or sweeps")
    parser.add_argument("--nodes", type=int, default=25, help="guesses in the tree (25, as in the paper's)")
    parser.add_argument("--depth", type=int, help="most levels; each costs a draft pass (as deep as in the runs)")
    parser.add_argument("--out", type=Path, default=Path("tree.json"), help="the file to write (tree.json)")
    return print_lines(parser, words, lambda asked: fit(asked.folders, asked.out, asked.nodes, asked.depth))


if __name__ == "__main__":
    sys.exit(main())
