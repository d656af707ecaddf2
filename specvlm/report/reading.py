"""Read folders as jobs: configuration, rows, and a name that distinguishes each job."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from specvlm.config import listed
from specvlm.errors import UserError
from specvlm.parsing.bounds import parse
from specvlm.results import metrics, rows
from specvlm.results.records import Figures, Ran

Row = dict[str, Any]
STRATEGIES = ("pruner", "drafter", "verifier", "dataset")
LOOKS = ("metric", "tracker")  # groups that change no answer
# Keys that the name of a series leaves out: ratio has its own axis, the others only change how a job was observed.
APART = ("ratio", "baseline", "record", "threads")


@dataclass(frozen=True, eq=False)
class Job:
    """The results of one configuration on its samples.

    Attributes:
        folder: Folder of the job.
        config: Plain configuration.
        rows: The samples' rows, in the data set's order; see `specvlm.results.rows` and `metrics.KEYS`. Samples that
            the job did not reach have none.
        series: Name of the job without its ratio, so that jobs that differ only in their ratio share it; see `named`.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]
    series: str = ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration with keys as on the command line, such as `pruner.mass`, without the groups in LOOKS."""
        return {key: value for key, value in flat(self.config) if key.partition(".")[0] not in LOOKS}

    @property
    def done(self) -> list[Row]:
        """Rows that are ok."""
        return [row for row in self.rows if row["status"] == "ok"]

    @cached_property
    def totals(self) -> dict[str, Any]:
        """Totals over these rows, as if they were all samples of the job; `metrics.TOTALS` explains them."""
        return metrics.totals(self.rows, len(self.rows))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json of the job; empty if it was killed before writing one."""
        return rows.summary_of(self.folder)

    @property
    def lossy(self) -> bool:
        """Whether an answer has the verdict lossy: its verifier may change the target's own output."""
        return "lossy" in self.totals["verdicts"]

    @cached_property
    def ratio(self) -> float | None:
        """Configured share of video tokens to drop; 0 if the pruner kept all of them, None if no pruner was used."""
        kept = [(row["kept_tokens"], row["video_tokens"]) for row in self.done if row["kept_tokens"] is not None]
        if not kept:
            return None
        return 0.0 if all(some == total for some, total in kept) else float(self.config["ratio"])

    @property
    def drops(self) -> str:
        """The ratio in words; empty if no pruner was used."""
        return "" if self.ratio is None else f"drops {100 * self.ratio:g} %"

    @property
    def label(self) -> str:
        """Name of the job: its series and its ratio."""
        return ", ".join(part for part in (self.series, self.drops) if part)

    def row(self, sample: str) -> Row | None:
        """Find the row of a sample; None if the job has none that is ok."""
        return next((row for row in self.done if row["sample"] == sample), None)

    @cached_property
    def steps(self) -> Mapping[str, list[Row]]:
        """Lines of steps.jsonl by sample; the first line of each sample is the prefill."""
        if rows.is_job(self.folder):
            return rows.steps_of(self.folder)
        return {self.done[0]["sample"]: rows.lines_of(self.folder / "steps.jsonl")}


def read_jobs(places: Sequence[Path]) -> list[Job]:
    """Read the jobs in and below these folders that have a finished sample.

    Raises UserError if there are none, or if the files of a job are damaged.
    """
    jobs = [job for job in map(read_job, folders_in(places)) if job.done]
    if not jobs:
        raise UserError(f"there is nothing to report: {'; '.join(failures(places))}")
    return named(jobs)


def failures(places: Sequence[Path]) -> list[str]:
    """One line for each job without a finished sample: its folder and the reason."""
    lost = [job for job in map(read_job, folders_in(places)) if not job.done]
    whys = [
        next((row.get("reason") for row in job.rows), None) or job.summary.get("reason") or "no sample is done" for job in lost
    ]
    return [f"{job.folder.name}: {why}" for job, why in zip(lost, whys, strict=True)]


def folders_in(places: Sequence[Path]) -> list[Path]:
    """Folders of runs and jobs in and below `places`, each once. Raises UserError for a place without any."""
    found: dict[Path, None] = {}
    for place in places:
        folders = [file.parent.resolve() for file in sorted(place.rglob("config.yaml"))]
        mine = [folder for folder in folders if rows.is_job(folder) or (folder / "summary.json").is_file()]
        if not mine:
            raise UserError(f"{place} is not a results folder of python -m specvlm, and contains none")
        found.update(dict.fromkeys(mine))
    return list(found)


def read_job(folder: Path) -> Job:
    """Read one job. A run of one video becomes a job of one sample, with its summary as the row.

    Raises UserError if a file is damaged or was written by another version.
    """
    config = rows.config_of(folder)
    parse(Ran, config, folder / "config.yaml")
    if rows.is_job(folder):
        return Job(folder, config, rows.rows_of(folder))
    summary = rows.summary_of(folder)
    if summary.get("status") == "failed":  # a job over samples that could not start
        return Job(folder, config, [])
    if missing := next((key for key in metrics.KEYS if key not in summary and key not in metrics.LATER), None):
        raise UserError(f"{folder / 'summary.json'} lacks {missing}: another version wrote it, run it again")
    parse(Figures, summary, folder / "summary.json")
    ran = {"sample": Path(listed(config["video"])[0]).stem, "index": 0, "status": "ok", "reason": None}
    return Job(folder, config, [ran | dict.fromkeys(("dataset", "split", "version")) | summary])


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def named(jobs: Sequence[Job]) -> list[Job]:
    """Name the series of each job and sort the jobs by series and ratio.

    A name consists of the pruner, if one was used, and every setting in which the jobs differ, except for the name of a
    drafter or verifier that most jobs share. Jobs that would have the same label get a number.
    """
    keys = list(dict.fromkeys(key for job in jobs for key in job.settings if key not in APART))
    words: list[list[str]] = [[] for _ in jobs]
    for key in keys:
        kind, _, field = key.partition(".")
        for job, said in zip(jobs, words, strict=True):
            if kind == "pruner" and job.ratio is None:
                continue  # nothing was pruned
            # Compare a strategy's field only among jobs with this strategy.
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
    """Select the jobs with the same value of `key` as `one`."""
    return [job for job in jobs if job.settings.get(key) == one.settings.get(key)]


def short(key: str, value: Any) -> str:
    """Shorten a setting for a name: `two_stage`, `mass=0.2`, `draft=plain`."""
    kind, _, field = key.partition(".")
    if field == "name" and kind in STRATEGIES:
        return str(value)
    if field == "path":
        return f"{kind}={str(value).rstrip('/').rpartition('/')[2]}"
    return f"{field if kind in STRATEGIES else key}={'null' if value is None else value}"
