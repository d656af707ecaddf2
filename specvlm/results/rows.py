"""The folder of a job over samples: written by one process or by several shards of it, read as one.

    config.yaml     what was asked for
    samples.jsonl   a line a sample, when it is done; of a shard samples.0-of-4.jsonl
    steps.jsonl     a line a round, written before its sample's line; of a shard steps.0-of-4.jsonl
    summary.json    the totals of all that is there, whole or not at all

Files only grow. A process killed in the middle leaves half a line, or rounds of a sample that has no line: whoever goes on
cuts them off. A sample tried again has two lines, of which the one that is ok counts; so has one that is checked behind
its answer, of which the checked one counts.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from specvlm import config
from specvlm.config import RunConfig
from specvlm.errors import UserError
from specvlm.parsing.bounds import parse
from specvlm.parsing.files import MOST_BYTES, json_of, open_regular, read_text, read_yaml
from specvlm.results.folder import check_there, write_yaml
from specvlm.results.records import Answered, Row, Summary, Totals

NO_MATTER = ("resume", "fail_fast", "shard", "baselines", "turn", "prefetch", "tracker")  # rows are the same whatever these are
SAMPLES, STEPS = "samples", "steps"
A_TOKEN, A_SAMPLE, SPARE = 400, 65_536, 2**20  # bytes on the disk, rather too many
UNCHECKED = (None, "not checked")  # values of hf_check that a later line may better


class CannotWrite(UserError):
    """The disk is full, or gone: no sample's fault, and no use in going on."""


class Taken(UserError):
    """By another process, or by results that are not to be touched."""


@contextmanager
def writable(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write into {folder}: {error.strerror or error}") from error


def room(folder: Path, samples: int, tokens: int) -> None:
    """Is there a disk to write to, before hours are spent? Raises CannotWrite."""
    needed = samples * (tokens * A_TOKEN + A_SAMPLE) + SPARE
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:  # of no name: other shards look at this folder, too
            probe.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    if free < needed:
        left, most = f"{free / 2**20:.0f} MiB", f"{needed / 2**20:.0f} MiB"
        raise CannotWrite(f"{folder} has {left} left, and results may take {most}: make room, or write elsewhere")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Each sample's line, of all shards, in the data set's order (see `records`). Raises UserError if damaged."""
    return [row for row, _ in _kept(folder)]


def _kept(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """With the file that each line is from."""
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for path in _files(folder, SAMPLES):
        for row in lines_of(path):
            if not {"sample", "index", "status"} <= row.keys():
                raise UserError(f"{path} has a line without sample, index or status: move the file away to start over")
            parse(Answered if row.get("status") == "ok" else Row, row, f"{path}, sample {row.get('sample')}")
            if row["sample"] not in found or _counts(row, found[row["sample"]][0]):
                found[row["sample"]] = row, path
    return sorted(found.values(), key=lambda kept: kept[0]["index"])


def _counts(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Does a sample's line count, and no longer the one before it?"""
    checked = row["status"] == "ok" and row.get("hf_check") not in UNCHECKED
    return before["status"] != "ok" or (checked and before.get("hf_check") in UNCHECKED)


def steps_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each sample that is done, of all shards."""
    files = {row["sample"]: path for row, path in _kept(folder) if row["status"] == "ok"}
    found: dict[str, list[dict[str, Any]]] = {sample: [] for sample in files}
    for path in dict.fromkeys(files.values()):  # rounds lie beside their row; those of a process that was killed have none
        rounds = path.with_name(path.name.replace(SAMPLES, STEPS, 1))
        for line in lines_of(rounds):
            if files.get(str(line.get("sample"))) == path:
                found[line["sample"]].append(line)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """What the job was asked for. Raises UserError where there is no job, or a damaged one."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: give the folder of a job")
    found = read_yaml(folder / "config.yaml")
    if not isinstance(found, dict):
        raise UserError(f"{folder / 'config.yaml'} is no configuration: it is damaged, or not ours")
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    """The totals, as last written; empty where there are none. Raises UserError for a file that is no JSON."""
    path = folder / "summary.json"
    try:
        found = json_of(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{path} is no JSON: run it again, or leave the folder out") from None
    parse(Totals if isinstance(found, dict) and "samples" in found else Summary, found, path)
    return found


def is_job(folder: Path) -> bool:
    """Has a job over samples written here?"""
    return bool(_files(folder, SAMPLES))


class Rows:
    """One process's files in a job's folder, its own until they are closed. folder: None where nothing is written.

    shard: (which, of how many). Raises Taken where another process writes them, where they hold rows and are not to be resumed,
    or rows of another configuration; CannotWrite where nothing can be written.
    """

    def __init__(self, cfg: RunConfig, folder: Path | None, shard: tuple[int, int] | None = None) -> None:
        self.folder, self.done = folder, set[str]()
        self._files: list[BinaryIO] = []
        self._lock: BaseFileLock | None = None
        if folder is None:
            return
        try:
            self._open(cfg, folder, shard)
        except BaseException:
            self.close()
            raise

    def _open(self, cfg: RunConfig, folder: Path, shard: tuple[int, int] | None) -> None:
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / ".lock"):  # shards begin one behind the other: the first says what is asked for
                    self._claim(cfg, folder, shard)
            except Timeout:
                raise Taken(f"another process writes into {folder}: wait for it, or take another folder") from None

    def _claim(self, cfg: RunConfig, folder: Path, shard: tuple[int, int] | None) -> None:
        if not is_job(folder) and (folder / "steps.jsonl").exists():
            raise Taken(f"{folder} holds a run without a data set: take another folder")
        part = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
        samples, steps = folder / f"{SAMPLES}{part}.jsonl", folder / f"{STEPS}{part}.jsonl"
        side_by_side = [] if shard is None else [folder / f"{SAMPLES}.{n}-of-{shard[1]}.jsonl" for n in range(shard[1])]
        others = [path for path in _files(folder, SAMPLES) if path not in (samples, *side_by_side)]
        self._lock = _lock_of(samples)
        self._lock.acquire()
        for path in others:
            with _lock_of(path):
                pass
        self._files = [open_regular(samples, "ab", buffering=0), open_regular(steps, "ab")]
        measured = list(_measured(samples))
        old, end = [line for line, _ in measured], measured[-1][1] if measured else 0
        there_already = len({row.get("sample") for row in [*old, *(row for path in others for row in lines_of(path))]})
        if there_already and not cfg.resume:
            raise Taken(f"{folder} holds {there_already} samples already: go on with resume=true, or take another folder")
        there = rows_of(folder)
        if there or any(path.exists() and _held(path) for path in side_by_side if path != samples):
            if not (folder / "config.yaml").is_file():
                raise Taken(f"{folder} holds samples and no config.yaml, which says of what: take another folder")
            _compare(config_of(folder), plain(cfg), folder)
        _cut(self._files[0], end)
        status, end = {row["sample"]: row["status"] for row in old}, 0
        for line, behind in _measured(steps):
            end = behind if status.get(line.get("sample")) == "ok" else end
        _cut(self._files[1], end)
        self.done = {row["sample"] for row in there if row["status"] == "ok"}
        if shard is None:
            for path in folder.glob("*.part"):  # of a process that was killed
                path.unlink()
        write_yaml(folder / "config.yaml", plain(cfg))

    def begin(self) -> None:
        """Of the next sample."""
        self._start = self._files[1].tell() if self._files else 0

    def step(self, line: Mapping[str, Any]) -> None:
        if self.folder:
            with writable(self.folder):
                self._files[1].write(json.dumps(line).encode() + b"\n")
                check_there(self._files[1])

    def end(self, row: Mapping[str, Any]) -> None:
        """The sample is done; when this returns, a line says so, on the disk. One that failed has no rounds."""
        if not self.folder:
            return
        samples, steps = self._files
        with writable(self.folder):
            if row["status"] != "ok":
                _cut(steps, self._start)
            steps.flush()
            os.fsync(steps.fileno())
            check_there(samples)
            before, text = samples.tell(), memoryview(json.dumps(row).encode() + b"\n")
            try:
                while text:
                    text = text[samples.write(text) :]
                os.fsync(samples.fileno())
            except OSError:
                _cut(samples, before)
                raise

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            with suppress(OSError):  # what a full disk did not take belongs to a sample that has no line
                file.close()
        self._files = []
        if self._lock is not None:
            self._lock.release()


def plain(cfg: RunConfig) -> dict[str, Any]:
    """A configuration as it is written: without what does not matter to its rows."""
    return {key: value for key, value in config.plain(cfg).items() if key not in NO_MATTER}


def _lock_of(samples: Path) -> BaseFileLock:
    """Who holds it is the only one to write. Raises Timeout, at once, where another process does."""
    return FileLock(samples.with_name(f".{samples.name}.lock"), timeout=0)


def _held(samples: Path) -> bool:
    try:
        with _lock_of(samples):
            return False
    except Timeout:
        return True


def _files(folder: Path, what: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{what}*.jsonl") if re.fullmatch(rf"{what}(\.\d+-of-\d+)?\.jsonl", path.name))


def _measured(path: Path, torn: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines, and where each ends; a last one that is not whole is none, or with `torn` one if it can be read.

    Raises UserError for one that is no JSON.
    """
    if not path.exists():
        return
    end = 0
    with open_regular(path) as file:
        for number in count(1):
            text = file.readline(MOST_BYTES + 1)
            if not text:
                return
            if len(text) > MOST_BYTES:
                raise UserError(f"{path}, line {number} has more than {MOST_BYTES} bytes: move the file away to start over")
            end += len(text)
            whole = text.endswith(b"\n")
            if not whole and not torn:
                continue
            try:
                line = json_of(text)
            except ValueError:
                line = None
            if not whole and not isinstance(line, dict):
                return
            if isinstance(line, dict):
                yield line, end
            elif line is not None or file.read(1):
                raise UserError(f"{path}, line {number}: this is no JSON object; move the file away to start over")


def lines_of(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """All whole lines of a file; torn: and a last one that lacks its end alone. Raises UserError for one that is no JSON."""
    return [line for line, _ in _measured(path, torn)]


def _cut(file: BinaryIO, end: int) -> None:
    file.flush()
    os.ftruncate(file.fileno(), end)
    file.seek(end)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, above: str = "") -> None:
    """Raises UserError for the first key in which two configurations differ."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, now, name = old.get(key), new.get(key), f"{above}{key}"
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            _compare(before, now, folder, f"{name}.")
        elif before != now and name not in NO_MATTER and (name, before) != ("check", None):  # rows can still be checked
            was = f"with {name}={before}" if key in old else f"without {name}"
            has = f"{name}={now}" if key in new else f"without {name}"
            raise Taken(f"{folder} was made {was}, this is {has}: take another folder")
