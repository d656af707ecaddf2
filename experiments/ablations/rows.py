"""From the folders of sweeps to rows that are committed: a line a job and scene, in `rows.jsonl` or `speed.jsonl`.

    family, job     whose pair, and the job's label (see presets.label_of); what it does not name is as in `standard`
    scene, tokens   the sample, and the length of the answer
    kept, video     video tokens that the drafter saw, and all
    accepted        guesses accepted by round, of rounds that no stop id or token limit cut short, in their order
    verdict         of the proof that the output is the target's own
    decode, end_to_end   seconds: of the job, of the target alone (null without a baseline); engine: how the steps ran

Before the rows of a family a line without a scene says what made them: `versions`, and `machine` as it was told.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from experiments.ablations.presets import BASES, FRAMES, Planned, family_of, planned, settings_of
from experiments.strategies.report import TITLES
from specvlm.errors import UserError
from specvlm.report.reading import Job, Row, folders_in, read_job
from specvlm.results.folder import attention_file

ROOT = Path(__file__).parent.parent  # experiments/
TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # shares of the video tokens
STEPS = ("none", "two_stage 0.9")  # whose rounds are kept as they were written
Values = NDArray[np.float64]


class Results:
    """Rows by family, job and scene."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.sources: dict[str, Row] = {}
        self.found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
        for row in rows:
            if "scene" in row:
                self.found[row["family"], row["job"]][row["scene"]] = row
            else:
                self.sources[row["family"]] = row

    @property
    def families(self) -> list[str]:
        return [family for family in TITLES if any(key[0] == family for key in self.found)]

    def of(self, family: str, label: str) -> list[Row]:
        return list(self.found.get((family, label), {}).values())

    def accepted(self, family: str, *labels: str) -> list[Values]:
        """Guesses accepted a round, a column a job, of the scenes that all have with a whole round."""
        jobs = [{row["scene"]: row for row in self.of(family, label) if row["accepted"]} for label in labels]
        scenes = [scene for scene in jobs[0] if all(scene in job for job in jobs)]
        return [np.array([np.mean(job[scene]["accepted"]) for scene in scenes], dtype=np.float64) for job in jobs]


@dataclass
class Gathered:
    """rows: as committed; attention: a line a scene; steps: lines of a job's steps.jsonl, by family, label and scene; told:
    which folders are of no experiment, and what failed or is missing in the others.
    """

    rows: list[Row] = field(default_factory=list)
    attention: list[Row] = field(default_factory=list)
    steps: dict[tuple[str, str], dict[str, list[Row]]] = field(default_factory=lambda: defaultdict(dict))
    told: list[str] = field(default_factory=list)


def gather(places: Sequence[Path], machine: str | None = None) -> Gathered:
    """What the jobs in these folders did for an experiment; of a job's scene that is there twice the first counts. Raises
    UserError for a place without any job.
    """
    plans = {(to, frozenset(job.settings.items())): job for to in FRAMES for name in BASES for job in planned(name, to)}
    found, sources, asked = Gathered(), dict[str, Row](), defaultdict[tuple[str, str], set[str]](set)
    failed: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    seen, looked = dict[tuple[str, str, str], Row](), set[tuple[str, str]]()
    for job in map(read_job, folders_in(places)):
        family = family_of(job.config)
        plan = plans.get((family, frozenset(settings_of(job.config, family).items()))) if family else None
        if family is None or plan is None:
            found.told.append(f"{job.folder.name}: of no experiment")
            continue
        key, first = (family, plan.label), job.config["dataset"]["first"]
        asked[key] |= {f"scene-{number:04d}" for number in range(first, first + job.config["dataset"]["scenes"])}
        failed[key] |= {row["sample"]: row["reason"] for row in job.rows if row["status"] != "ok"}
        if not job.rows and (reason := job.summary.get("reason")):  # it could not begin
            failed[key][""] = reason
        source = sources.setdefault(family, {"family": family, "machine": machine, "versions": []})
        if (versions := job.summary.get("versions")) and versions not in source["versions"]:
            source["versions"].append(versions)
        for row in job.done:
            line = compact(family, plan, job, row)
            there = seen.setdefault((*key, row["sample"]), line)
            if there is not line:
                if there["accepted"] != line["accepted"]:
                    found.told.append(f"{', '.join(key)}: {row['sample']} of {job.folder} accepts otherwise than before")
                continue
            found.rows.append(line)
            if plan.label in STEPS:
                found.steps[key][row["sample"]] = job.steps[row["sample"]]
        found.attention += [line for line in shares(family, plan, job) if (family, line["scene"]) not in looked]
        looked = {(line["family"], line["scene"]) for line in found.attention}
    for key, scenes in asked.items():
        done = sum((*key, scene) in seen for scene in scenes)
        why = [reason for scene, reason in failed[key].items() if (*key, scene) not in seen]
        if done < len(scenes):
            lost = f"; {len(why)} failed: {why[0]}" if why else ""
            found.told.append(f"{', '.join(key)}: {done} of {len(scenes)} scenes{lost}")
    found.rows[:0] = sources.values()
    return found


def compact(family: str, plan: Planned, job: Job, row: Row) -> Row:
    steps = job.steps[row["sample"]]
    whole = [step["accepted"] for step in steps[1:] if step["full"]]
    if len(steps) != row["rounds"] + 1 or (whole and abs(np.mean(whole) - row["accepted_per_round"]) > 1e-9):
        raise UserError(f"{job.folder}: the rounds of {row['sample']} are not those of its row")
    seconds = {
        what: [None if value is None else round(value, 3) for value in (row[f"{what}_s"], row[f"baseline_{what}_s"])]
        for what in ("decode", "end_to_end")
    }
    figures = {"tokens": row["new_tokens"], "kept": row["kept_tokens"], "video": row["video_tokens"], "accepted": whole}
    told = {"verdict": row["verdict"], **seconds, "engine": row["engine"]["target"]}
    return {"family": family, "job": plan.label, "scene": row["sample"]} | figures | told


def shares(family: str, plan: Planned, job: Job) -> Iterable[Row]:
    """What part of the target's attention to the video its most attended tokens have; of jobs run with record=true."""
    for row in job.done:
        file = attention_file(job.folder, row["index"])
        if plan.settings["frames"] is None and file.is_file():
            mass = np.sort(load_file(file)["verifier_attention"].astype(np.float64))[::-1]
            tops = {f"{top:g}": round(float(mass[: int(top * len(mass))].sum() / mass.sum()), 4) for top in TOPS}
            yield {"family": family, "scene": row["sample"], "video": len(mass), "top": tops}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def missing(found: Gathered, families: Iterable[str]) -> Iterable[str]:
    """The planned jobs of these pairs without a row."""
    there = {(row["family"], row["job"]) for row in found.rows if "job" in row}
    for family in families:
        every = dict.fromkeys(job.label for experiment in BASES for job in planned(experiment, family))
        if gone := [label for label in every if (family, label) not in there]:
            yield f"{family}: no rows of {', '.join(gone)}"


def write(found: Gathered, name: str, root: Path = ROOT, fewer: bool = False) -> list[Path]:
    """Into every experiment's folder, in place of what was there of these families. name: `rows` or `speed`. Raises UserError
    where a job would have fewer scenes than before, unless `fewer`.
    """
    new: dict[Path, tuple[list[Row], list[str]]] = {}
    for experiment in BASES:
        order = list(dict.fromkeys(job.label for family in FRAMES for job in planned(experiment, family)))
        families = {row["family"] for row in found.rows if row.get("job") in order}
        if mine := [row for row in found.rows if row["family"] in families and row.get("job", order[0]) in order]:
            new[root / experiment / f"{name}.jsonl"] = mine, order
            before = Counter((row["family"], row["job"]) for row in read(root / experiment / f"{name}.jsonl") if "job" in row)
            now = Counter((row["family"], row.get("job")) for row in mine)
            lost = [key for key, count in before.items() if key[0] in families and now[key] < count]
            if lost and not fewer:
                less = f"{', '.join(lost[0])} has {now[lost[0]]} scenes here, and {before[lost[0]]} there"
                raise UserError(f"{experiment}/{name}.jsonl would lose rows ({less}): give all folders, or --fewer")
    files = [replace(path, mine, order) for path, (mine, order) in new.items()]
    if name == "rows" and found.attention:
        files.append(replace(root / "findings" / "attention.jsonl", found.attention, []))
    if name == "rows":
        for (family, label), scenes in found.steps.items():
            text = "".join(f"{json.dumps(line)}\n" for scene in sorted(scenes) for line in scenes[scene])
            path = root / "main_table" / "steps" / f"{family}-{label.split()[0]}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
            files.append(path)
    return files


def replace(path: Path, rows: Sequence[Row], order: Sequence[str]) -> Path:
    families = {row["family"] for row in rows}
    every = [row for row in read(path) if row["family"] not in families] + list(rows)

    def place(row: Row) -> tuple[int, int, str]:
        where = order.index(row["job"]) if row.get("job") in order else -1
        return list(TITLES).index(row["family"]), where, row.get("scene", "")

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, separators=(",", ":")) for row in sorted(every, key=place))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
