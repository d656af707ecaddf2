"""Rows and table of real footage: python -m experiments.real_footage [FOLDER...]

FOLDER: one that holds sweeps of experiment=real_footage; without one the table is made anew from the committed rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.ablations.presets import family_of
from experiments.ablations.rows import read
from experiments.ablations.tables import markdown
from experiments.strategies.report import TITLES, filled
from specvlm.errors import ExitCode, UserError
from specvlm.report.reading import Row, folders_in, read_job

PAGE, ROWS = (Path(__file__).with_name(name) for name in ("README.md", "rows.jsonl"))
MEANS = {
    "video tokens": ("video_tokens", "{:,.0f}"),
    "drafter saw": ("kept_tokens", "{:,.0f}"),
    "to the first token, s": ("first_token_s", "{:.2f}"),
    "drafter start, s": ("drafter_start_s", "{:.2f}"),
    "a round, ms": ("round_ms", "{:.1f}"),
    "the target's own step, ms": ("step_ms", "{:.1f}"),
    "peak, MiB": ("peak_mib", "{:,.0f}"),
}


def row_of(found: Row, cfg: Mapping[str, Any]) -> Row:
    """Of a sample: times in seconds or ms; a round is a draft of five guesses and its check, a step one token of the target."""
    return {
        "family": family_of(cfg),
        "frames": cfg["frames"],
        "pruner": cfg["pruner"]["name"],
        "video": found["sample"],
        "video_tokens": found["video_tokens"],
        "kept_tokens": found["kept_tokens"],
        "read_s": round(found["times_s"]["video"], 3),
        "first_token_s": round(found["time_to_first_token_s"], 4),
        "drafter_start_s": round(found["drafter_start_s"], 4),
        "round_ms": round(1e3 * found["decode_s"] / found["rounds"], 3),
        "step_ms": round(1e3 * found["baseline_decode_s"] / max(1, len(found["baseline_token_ids"]) - 1), 3),
        "accepted": round(found["accepted_per_round"], 3),
        "peak_mib": round(found["peak_memory_bytes"] / 2**20),
        "verdict": found["verdict"],
    }


def gather(folders: Sequence[Path]) -> list[Row]:
    jobs = [read_job(folder) for folder in folders_in(folders)]
    if other := [job.folder for job in jobs if family_of(job.config) is None or job.config["dataset"] is None]:
        raise UserError(f"{other[0]} is no job of an embedded pair over a data set")
    return [row_of(found, job.config) for job in jobs for found in job.done]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means over the clips that have as many frames."""
    lines = [["pair", "frames", "clips", "pruner", *MEANS]]
    for family, frames, pruner in dict.fromkeys((row["family"], row["frames"], row["pruner"]) for row in rows):
        mine = [row for row in rows if (row["family"], row["frames"], row["pruner"]) == (family, frames, pruner)]
        figures = [form.format(fmean(row[key] for row in mine)) for key, form in MEANS.values()]
        lines.append([TITLES[family], str(frames), str(len(mine)), f"`{pruner}`", *figures])
    yield from markdown(lines)
    same = sum(row["verdict"] == "identical" for row in rows)
    yield f"\n{same} of {len(rows)} answers identical to the target's own."


def readme(text: str) -> str:
    """The text with its table made anew from the committed rows."""
    return filled(text, "footage", table(read(ROWS)))


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for a mistake, which one line on stderr explains."""
    try:
        if words:
            order = list(TITLES)
            rows = sorted(gather([Path(word) for word in words]), key=lambda row: (order.index(row["family"]), row["frames"]))
            ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        PAGE.write_text(readme(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"real_footage: {' '.join(str(error).split())}", file=sys.stderr)
        return ExitCode.MISTAKE
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
