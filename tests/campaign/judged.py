"""What is wrong with a command in which a hostile strategy took part: its end, its rows, and those of innocent jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from campaign.fork import Ended
from campaign.sweeps import damage, untimed

PLUGIN = "specvlm_hostile"
LATE_S = 500  # more than any baseline takes: `writes_baselines_times` writes 1000 s
Rows = dict[tuple[str, str], dict[str, Any]]  # by strategy and sample


def named(text: str, names: Sequence[str]) -> bool:
    return any(name in text for name in (*names, PLUGIN, PLUGIN.replace("_", "-")))


def ends_of(ended: Ended, names: Sequence[str]) -> list[str]:
    """What is wrong with how a command ended in which these took part."""
    faults = []
    if ended.code is None:
        faults.append("hung")
    elif ended.code not in (0, 1, 2, 3, 5):
        faults.append(f"the process ended with exit code {ended.code}, stderr {ended.err[-200:]!r}")
    if "Traceback" in ended.err + ended.out and not named(ended.err + ended.out, names):
        faults.append(f"a traceback that does not name the plugin: {ended.err[-200:]!r}")
    return faults


def answer_faults(found: dict[str, Any], right: dict[str, Any], code: int | None) -> list[str]:
    """Of an answer, as a row or a summary has it, and of the exit code beside it."""
    verdict, tokens = str(found.get("verdict")), right["token_ids"]
    own = verdict.startswith(("identical", "numeric tie"))
    faults = [f"a wrong output is called {verdict}"] * (own and found.get("token_ids") != tokens)
    faults += ["a wrong text is called identical"] * (
        own and found.get("token_ids") == tokens and found.get("text") != right["text"]
    )
    checked = not verdict.startswith(("sampled", "not checked"))
    faults += [f"the baseline is not the target's own ({verdict})"] * (checked and found.get("baseline_token_ids") != tokens)
    return faults + ["exit code is not 1 for a MISMATCH"] * (verdict.startswith("MISMATCH") and code != 1)


def rows_faults(folder: Path, kind: str, right: Rows, whole: bool = True) -> list[str]:
    """Of innocent jobs, whose rows are to be these. whole: all of them must be there."""
    there, faults = rows_of(folder, kind)
    missing = [f"{name} {sample}" for name, sample in right if (name, sample) not in there] if whole else []
    changed = [f"{' '.join(key)}: {text}" for key in right if key in there and (text := difference(there[key], right[key]))]
    faults += [f"{len(missing)} of {len(right)} innocent rows missing ({', '.join(missing)})"] * bool(missing)
    return faults + [f"{len(changed)} of {len(right)} innocent rows changed ({changed[0]})" for _ in changed[:1]]


def difference(row: dict[str, Any], right: dict[str, Any]) -> str:
    """What an innocent row has otherwise."""
    if (row.get("baseline_end_to_end_s") or 0) > LATE_S:
        return "a time that nobody took"
    row, right = untimed(row), untimed(right)
    keys = [key for key in ("status", "verdict", "token_ids", *sorted(row | right)) if row.get(key) != right.get(key)]
    keys = [key for key in keys if key != "baseline"]  # its key, which names the plugins that are there
    return f"{keys[0]} is {row.get(keys[0])!s:.120}, not {right.get(keys[0])!s:.120}" if keys else ""


def rows_of(folder: Path, kind: str) -> tuple[Rows, list[str]]:
    """Every row of a sweep, by the strategy of that kind, and what is wrong with its files."""
    found: Rows = {}
    faults = []
    for path in sorted(folder.glob("*/samples*.jsonl")):
        try:
            name = yaml.safe_load((path.parent / "config.yaml").read_text())[kind]["name"]
            for line in path.read_text().splitlines():
                found[name, json.loads(line)["sample"]] = json.loads(line)
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"files of {path.parent.name[-60:]} are damaged: {error!r:.100}")
    try:
        faults += [f"damaged: {what}" for what in damage(folder)]
    except (OSError, ValueError, KeyError) as error:
        faults += [f"damaged: {error!r:.100}"] * (not faults)
    return found, faults


def summary_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
