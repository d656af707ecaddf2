"""Run a sweep from Python and read its rows back.

python examples/sweep.py FOLDER
"""

import sys
from pathlib import Path

from specvlm.__main__ import main
from specvlm.results.rows import rows_of


def sweep(folder: Path, scenes: int = 4) -> dict[str, float]:
    """Run the sweep; returns each job's number of guesses accepted per round, averaged over the scenes."""
    words = ["pruner=uniform,two_stage", "dataset=synthetic", f"dataset.scenes={scenes}"]
    code = main(["-m", *words, f"hydra.sweep.dir={folder}"])
    if code:
        raise SystemExit(code)
    found = {}
    for samples in sorted(folder.glob("*/samples.jsonl")):
        rows = rows_of(samples.parent)
        found[samples.parent.name] = sum(row["accepted_per_round"] for row in rows) / len(rows)
    return found


if __name__ == "__main__":
    for job, accepted in sweep(Path(sys.argv[1])).items():
        print(f"{accepted:.2f} {job}")
