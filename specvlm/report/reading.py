"""From folders to jobs: what each was, what came of each of its samples, and what tells it from the others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from specvlm.errors import UserError
from specvlm.parsing.bounds import parse
from specvlm.results import metrics, rows
from specvlm.results.records import Figures, Ran

Row = dict[str, Any]
STRATEGIES = ("pruner", "drafter", "verifier", "dataset")
# What is not compared: how a job was watched, and ratio, which is an axis of its own.
APART = ("ratio", "baseline", "record", "threads")


@dataclass(frozen=True, eq=False)
class Job:
    """One configuration over samples. rows: one a sample, in the data set's order, of the keys that `specvlm.results.rows` and
    `metrics.KEYS` explain. series: what tells it from the other jobs, but for the ratio.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]
    series: str = ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, with keys as on the command line: `pruner.mass`."""
        return dict(flat(self.config))

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "ok"]

    @cached_property
    def totals(self) -> dict[str, Any]:
        """What `metrics.TOTALS` explains, of the rows that are there."""
        return metrics.totals(self.rows, len(self.rows))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the job itself wrote last; nothing where it was killed before."""
        return rows.summary_of(self.folder)

    @property
    def lossy(self) -> bool:
        """Its output is not the target's, by its verifier's rule."""
        return "lossy" in self.totals["verdicts"]

    @cached_property
    def ratio(self) -> float | None:
        """Share of the video tokens that the drafter was not to see; None where no pruner chose."""
        kept = [(row["kept_tokens"], row["video_tokens"]) for row in self.done if row["kept_tokens"] is not None]
        if not kept:
            return None
        return 0.0 if all(some == total for some, total in kept) else float(self.config["ratio"])

    @property
    def drops(self) -> str:
        return "" if self.ratio is None else f"drops {100 * self.ratio:g} %"

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.series, self.drops) if part)

    def row(self, sample: str) -> Row | None:
        return next((row for row in self.done if row["sample"] == sample), None)

    @cached_property
    def steps(self) -> Mapping[str, list[Row]]:
        """By sample its rounds, the prefill first."""
        if rows.is_job(self.folder):
            return rows.steps_of(self.folder)
        return {self.done[0]["sample"]: rows.lines_of(self.folder / "steps.jsonl")}


def read_jobs(places: Sequence[Path]) -> list[Job]:
    """The jobs in and below these folders that did a sample. Raises UserError if a place has no job, or none did."""
    jobs = [job for job in map(read_job, folders_in(places)) if job.done]
    if not jobs:
        raise UserError(f"there is nothing to report: {'; '.join(failures(places))}")
    return named(jobs)


def failures(places: Sequence[Path]) -> list[str]:
    """A line for each job that did no sample: its folder, and why."""
    lost = [job for job in map(read_job, folders_in(places)) if not job.done]
    whys = [
        next((row.get("reason") for row in job.rows), None) or job.summary.get("reason") or "no sample is done" for job in lost
    ]
    return [f"{job.folder.name}: {why}" for job, why in zip(lost, whys, strict=True)]


def folders_in(places: Sequence[Path]) -> list[Path]:
    """Each once."""
    found: dict[Path, None] = {}
    for place in places:
        folders = [file.parent.resolve() for file in sorted(place.rglob("config.yaml"))]
        mine = [folder for folder in folders if rows.is_job(folder) or (folder / "summary.json").is_file()]
        if not mine:
            raise UserError(f"{place} is no folder that python -m specvlm wrote, and holds none")
        found.update(dict.fromkeys(mine))
    return list(found)


def read_job(folder: Path) -> Job:
    """A run of one video is a job of one sample, whose row is its summary."""
    config = rows.config_of(folder)
    parse(Ran, config, folder / "config.yaml")
    if rows.is_job(folder):
        return Job(folder, config, rows.rows_of(folder))
    summary = rows.summary_of(folder)
    if summary.get("status") == "failed":  # a job over samples that could not begin
        return Job(folder, config, [])
    if missing := next((key for key in metrics.KEYS if key not in summary and key not in metrics.LATER), None):
        raise UserError(f"{folder / 'summary.json'} lacks {missing}: another version wrote it, run it again")
    parse(Figures, summary, folder / "summary.json")
    ran = {"sample": Path(config["video"]).stem, "index": 0, "status": "ok", "reason": None}
    return Job(folder, config, [ran | dict.fromkeys(("dataset", "split", "version")) | summary])


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def named(jobs: Sequence[Job]) -> list[Job]:
    """With their series: the pruner's name, and every setting in which jobs differ. Of drafters and verifiers the one that
    most jobs have is not said. Series together, by ratio.
    """
    keys = list(dict.fromkeys(key for job in jobs for key in job.settings if key not in APART))
    words: list[list[str]] = [[] for _ in jobs]
    for key in keys:
        kind, _, field = key.partition(".")
        for job, said in zip(jobs, words, strict=True):
            if kind == "pruner" and job.ratio is None:
                continue  # nothing was pruned
            # A field of a strategy is compared among those jobs that have this strategy.
            peers = jobs if kind not in STRATEGIES or field == "name" else same(jobs, job, f"{kind}.name")
            found = Counter(repr(peer.settings.get(key)) for peer in peers)
            usual = key in ("drafter.name", "verifier.name") and 2 * found[repr(job.settings.get(key))] > len(peers)
            if key == "pruner.name" or (len(found) > 1 and not usual):
                said.append(short(key, job.settings.get(key)))
    series = [" ".join(said) or str(job.settings.get("drafter.name")) for job, said in zip(jobs, words, strict=True)]
    called = [replace(job, series=name) for job, name in zip(jobs, series, strict=True)]
    twice, seen = Counter(job.label for job in called), Counter[str]()
    for place, job in enumerate(called):
        if twice[job.label] > 1:
            seen[job.label] += 1
            called[place] = replace(job, series=f"{job.series} #{seen[job.label]}")
    order = list(dict.fromkeys(job.series for job in called))
    return sorted(called, key=lambda job: (order.index(job.series), job.ratio or 0.0))


def same(jobs: Sequence[Job], one: Job, key: str) -> list[Job]:
    return [job for job in jobs if job.settings.get(key) == one.settings.get(key)]


def short(key: str, value: Any) -> str:
    """`two_stage`, `mass=0.2`, `draft=plain`."""
    kind, _, field = key.partition(".")
    if field == "name" and kind in STRATEGIES:
        return str(value)
    if field == "path":
        return f"{kind}={str(value).rstrip('/').rpartition('/')[2]}"
    return f"{field if kind in STRATEGIES else key}={'null' if value is None else value}"
