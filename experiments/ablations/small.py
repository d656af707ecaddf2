"""The ablations in small, as `make ablation` runs them: python -m experiments.ablations.small [--pair NAME] [--scenes N]

Fifteen jobs of main_table, ratio_by_pruner and stage_one_mass in two processes, half of the scenes each; then the report, the
main table and the findings with their verdicts. Broken off, the same line goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from specvlm.errors import ExitCode, UserError, worst

SWEEPS = (
    ("experiment=main_table", "drafter=tree", "record=true"),
    ("experiment=main_table", "drafter=self", "pruner=none,uniform,two_stage"),
    ("experiment=ratio_by_pruner", "pruner=random,two_stage", "ratio=0.25,0.5"),
    ("experiment=stage_one_mass", "pruner.mass=0.2"),
)
SHARDS, EVERY = 2, 15.0  # processes; seconds between two lines of progress
GO_ON = (ExitCode.OK, ExitCode.MISMATCH, ExitCode.FAILED)  # the tables name what failed


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: the worst of the sweeps' own."""
    parser = argparse.ArgumentParser("python -m experiments.ablations.small", description="The ablations in small.")
    parser.add_argument("--pair", default="embedded_qwen2_5_vl", help="or embedded_llava_onevision")
    parser.add_argument("--scenes", type=int, default=24)
    asked = parser.parse_args(words)
    folder = Path("outputs/ablation") / f"{asked.pair}-{asked.scenes}"
    try:
        code: int = ExitCode.OK
        for own in SWEEPS:
            code = worst([code, sweep([*own, f"pair={asked.pair}", f"dataset.scenes={asked.scenes}"], folder)])
            if code not in GO_ON:
                return code
        for line in told(folder):
            print(line, flush=True)
    except (UserError, OSError) as error:
        print(f"ablation: {' '.join(str(error).split())}", file=sys.stderr)
        return ExitCode.MISTAKE
    return code


def sweep(words: Sequence[str], folder: Path) -> int:
    """All shards of it side by side; the worst exit code. Of what one that fails says, the last lines go to stderr."""
    print(f"sweep: {' '.join(words)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"shard-{number}.log" for number in range(SHARDS)]
    each = []
    for number, log in enumerate(logs):
        own = [f"shard={number}/{SHARDS}", "resume=true", f"hydra.sweep.dir={folder}"]
        with log.open("w") as file:
            command = [sys.executable, "-m", "specvlm", "-m", *words, *own]
            each.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    try:
        last = time.monotonic()
        while any(one.poll() is None for one in each):
            time.sleep(0.2)
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                print(f"  {answers(folder)} answers", flush=True)
    finally:
        for one in each:
            one.terminate()
    for one, log in zip(each, logs, strict=True):
        if one.returncode:
            print("".join(f"  {line}\n" for line in log.read_text().splitlines()[-12:]), file=sys.stderr, end="")
    return worst(ExitCode.FAULT if one.returncode < 0 else one.returncode for one in each)  # < 0: by a signal


def answers(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("*/samples*.jsonl"))


def told(folder: Path) -> Iterator[str]:
    """The report's path, the main table and the findings."""
    from experiments.ablations import rows, tables
    from specvlm.report.__main__ import main as report

    page = folder / "report.html"
    if code := report([str(folder), "-o", str(page), "--title", "Ablations in small"]):
        raise UserError(f"the report was not written (exit code {code})")
    found = rows.gather([folder])
    results = rows.Results(found.rows)
    for family in results.families:
        for name, table in (
            ("main_table", tables.acceptance),
            ("main_table", tables.speed),
            ("ratio_by_pruner", tables.acceptance),
        ):
            yield from ("", *tables.aligned(table(name, results, family)))
        yield f"\n{tables.verdicts('main_table', results, family)}"
    yield from found.told
    yield "Times are of two processes side by side, and of whatever else this machine did."
    yield "\nThe paper's findings:"
    _, *lines = tables.judged(results, found.attention)
    for (name, claim), some in groupby(lines, key=lambda cells: (cells[0], cells[1])):
        yield f"{name}: {claim}"
        yield from (f"    {line}" for line in tables.aligned([cells[3:] for cells in some]))
    yield f"\nreport: {page}"


if __name__ == "__main__":
    sys.exit(main())
