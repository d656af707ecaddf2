"""Clips of every kind (tests/videos/cells.py) by every reader: it shows what ffmpeg shows, or says in a line why not."""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from videos.cells import CELLS, MEMBERS, Cell
from videos.edits import Maker
from videos.ffmpeg import Shown, shown
from videos.judge import Verdict, judged, readers

COUNT, SAMPLE = len(CELLS), 14  # one of every container


def verdicts(cells: Iterable[Cell], folder: Path) -> Iterator[tuple[Cell, Shown | str, str, Verdict]]:
    """Of every cell and reader what ffmpeg shows, and the judgement."""
    make, kinds = Maker(folder), readers()
    for number, cell in enumerate(cells):
        path = make(cell)
        truth = shown(path)
        for reader in kinds:
            yield cell, truth, reader, judged(path, truth, reader, folder / f"{number}-{reader}")


def right(cell: Cell, truth: Shown | str, reader: str, verdict: Verdict) -> bool:
    """A refusal is right where nobody knows the frames, and for a reader that was asked for and names one that can."""
    if verdict.kind == "refused":
        return cell.doubtful or isinstance(truth, str) or (reader == "decord" and "reader=" in verdict.why)
    return verdict.kind == "read"


def chosen(count: int, seed: int) -> list[Cell]:
    """The members of every kind first, then others at random."""
    others = [name for name in CELLS if name not in MEMBERS]
    random.Random(seed).shuffle(others)
    return [CELLS[name] for name in [*MEMBERS, *others][:count]]


def run(count: int, seed: int) -> list[str]:
    found, kinds = [], Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        for cell, truth, reader, verdict in verdicts(chosen(count, seed), Path(folder)):
            kinds[reader, verdict.kind] += 1
            if not right(cell, truth, reader, verdict):
                found.append(f"{cell} by {reader}: {verdict}")
    for (reader, kind), number in sorted(kinds.items()):
        print(f"videos: {reader}: {number} {kind}", file=sys.stderr)
    return found
