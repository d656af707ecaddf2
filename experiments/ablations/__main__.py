"""Rows, tables and plots of the ablations: python -m experiments.ablations [FOLDER...] [--speed "MACHINE"]

    python -m experiments.ablations RUNS/qwen2_5_vl RUNS/llava_onevision      # rows.jsonl, README tables and plots
    python -m experiments.ablations outputs/ablation --speed "…, one thread"  # speed.jsonl: of one quiet machine
    python -m experiments.ablations                                           # tables and plots of the committed rows

FOLDER: one that holds sweeps, however deep, of any preset or none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.ablations import plot, rows, tables
from experiments.ablations.presets import BASES
from experiments.ablations.rows import ROOT
from specvlm.errors import UserError


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake, which one line on stderr explains."""
    parser = argparse.ArgumentParser("python -m experiments.ablations", description="Rows, tables and plots of the ablations.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="sweeps, of any preset or none")
    parser.add_argument("--speed", metavar="MACHINE", help="they ran alone on this machine: write speed.jsonl, not rows.jsonl")
    parser.add_argument("--fewer", action="store_true", help="rows of more scenes than are given here may go")
    asked = parser.parse_args(words)
    try:
        if asked.folders:
            found = rows.gather(asked.folders, asked.speed)
            for path in rows.write(found, "speed" if asked.speed else "rows", fewer=asked.fewer):
                print(f"written: {path.relative_to(ROOT.parent)}")
            families = dict.fromkeys(row["family"] for row in found.rows)
            print(*found.told, *([] if asked.speed else rows.missing(found, families)), sep="\n")
        for experiment in (*BASES, "findings"):
            page = ROOT / experiment / "README.md"
            page.write_text(tables.readme(experiment, page.read_text(encoding="utf-8")), encoding="utf-8")
        plot.draw(tables.all_rows(), rows.read(ROOT / "findings" / "attention.jsonl"))
    except (UserError, OSError) as error:
        print(f"ablations: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
