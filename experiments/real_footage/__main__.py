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
from experiments.strategies.report import TITLES, filled
from specvlm.report.reading import Row, folders_in, read_job

HERE = Path(__file__).parent
ROWS = HERE / "rows.jsonl"
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
    return [row_of(found, job.config) for job in jobs for found in job.done]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Means over the clips that have as many frames."""
    yield f"| pair | frames | clips | pruner | {' | '.join(MEANS)} |"
    yield "|" + "---|" * (4 + len(MEANS))
    for family, frames, pruner in dict.fromkeys((row["family"], row["frames"], row["pruner"]) for row in rows):
        mine = [row for row in rows if (row["family"], row["frames"], row["pruner"]) == (family, frames, pruner)]
        figures = [form.format(fmean(row[key] for row in mine)) for key, form in MEANS.values()]
        yield f"| {TITLES[family]} | {frames} | {len(mine)} | `{pruner}` | {' | '.join(figures)} |"
    same = sum(row["verdict"] == "identical" for row in rows)
    yield f"\n{same} of {len(rows)} answers identical to the target's own."


def main(words: Sequence[str]) -> int:
    if words:
        rows = sorted(gather([Path(word) for word in words]), key=lambda row: (row["family"] != "qwen2_5_vl", row["frames"]))
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page, rows = HERE / "README.md", [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    page.write_text(filled(page.read_text(encoding="utf-8"), "footage", table(rows)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
