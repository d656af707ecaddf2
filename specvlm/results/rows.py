"""The folder of a job over samples. One process writes it, or several shards; readers see one job.

    config.yaml     the configuration
    samples.jsonl   one line per sample, written when it is done; samples.0-of-4.jsonl for a shard
    steps.jsonl     one line per round, written before its sample's line; steps.0-of-4.jsonl for a shard
    summary.json    the totals over all rows, replaced atomically

Lines are appended. The rounds of a sample that fails are cut off again. So is, when the job is resumed, what a killed
process left: half a line, or rounds of a sample without a line. A sample that failed and is tried again has two lines,
and so has one that is checked after its answer; the later line counts.
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

# Keys that do not change the rows.
NEUTRAL_KEYS = ("resume", "fail_fast", "shard", "baselines", "turn", "prefetch", "prefixes", "tracker")
SAMPLES, STEPS = "samples", "steps"
A_TOKEN, A_SAMPLE, SPARE = 400, 65_536, 2**20  # bytes on disk per token, per sample and in all, estimated generously
UNCHECKED = (None, "not checked")  # values of hf_check that a later line may replace


class CannotWrite(UserError):
    """A folder cannot be written, as when the disk is full. Ends the sweep: nothing else could be written either."""


class Taken(UserError):
    """The folder is in use by another process, or holds results that must not be overwritten."""


@contextmanager
def writable(folder: Path | None) -> Iterator[None]:
    """Turn an OSError into CannotWrite, naming `folder`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write into {folder}: {error.strerror or error}") from error


def room(folder: Path, samples: int, tokens: int) -> None:
    """Create `folder` and raise CannotWrite unless it can be written and has room. tokens: maximum per sample."""
    needed = samples * (tokens * A_TOKEN + A_SAMPLE) + SPARE
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:  # nameless: other shards read this folder too
            probe.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    if free < needed:
        left, most = f"{free / 2**20:.0f} MiB", f"{needed / 2**20:.0f} MiB"
        raise CannotWrite(f"{folder} has {left} left, but results may take {most}: free some space, or use another disk")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Read the row of each sample, over all shards, in the data set's order.

    Args:
        folder: Folder of a job.

    Returns:
        Rows as `records.Answered` if ok, else as `records.Row`.

    Raises:
        UserError: A file is damaged.
    """
    return [row for row, _ in _current_rows(folder)]


def _current_rows(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """Find for each sample the line that counts, as the module docstring says, and the file it comes from."""
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for path in _files(folder, SAMPLES):
        for row in lines_of(path):
            if not {"sample", "index", "status"} <= row.keys():
                raise UserError(f"{path} has a line without sample, index or status: move the file away to start over")
            parse(Answered if row.get("status") == "ok" else Row, row, f"{path}, sample {row.get('sample')}")
            if row["sample"] not in found or _replaces(row, found[row["sample"]][0]):
                found[row["sample"]] = row, path
    return sorted(found.values(), key=lambda kept: kept[0]["index"])


def _replaces(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether `row` replaces `before`, an earlier line of its sample: if that is not ok, or lacks `row`'s check."""
    checked = row["status"] == "ok" and row.get("hf_check") not in UNCHECKED
    return before["status"] != "ok" or (checked and before.get("hf_check") in UNCHECKED)


def steps_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the rounds of each sample that is ok, over all shards, by sample id. Raises UserError for a damaged file."""
    files = {row["sample"]: path for row, path in _current_rows(folder) if row["status"] == "ok"}
    found: dict[str, list[dict[str, Any]]] = {sample: [] for sample in files}
    for path in dict.fromkeys(files.values()):  # skip rounds without a row: their process was killed
        rounds = path.with_name(path.name.replace(SAMPLES, STEPS, 1))
        for line in lines_of(rounds):
            if files.get(str(line.get("sample"))) == path:
                found[line["sample"]].append(line)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Read the configuration of a run or a job. Raises UserError if it is missing or damaged."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: give the folder of a job")
    found = read_yaml(folder / "config.yaml")
    if not isinstance(found, dict):
        raise UserError(f"{folder / 'config.yaml'} is not a configuration of specvlm, or it is damaged")
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    """Read summary.json of a run or a job; empty if there is none yet. Raises UserError if it is damaged."""
    path = folder / "summary.json"
    try:
        found = json_of(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{path} is not valid JSON: run it again, or leave the folder out") from None
    parse(Totals if isinstance(found, dict) and "samples" in found else Summary, found, path)
    return found


def is_job(folder: Path) -> bool:
    """Whether `folder` has a samples file, so that it belongs to a job over samples."""
    return bool(_files(folder, SAMPLES))


class Rows:
    """The files that one process writes in a job's folder, locked until `close`. `done`: ids of samples already ok.

    Args:
        cfg: Configuration of the job.
        folder: Folder of the job. None: write nothing.
        shard: (index, number of shards).

    Raises:
        Taken: Another process writes these files; or the folder holds rows and `resume` is off, rows of another
            configuration, or a run without a data set.
        CannotWrite: The folder cannot be written.
        UserError: A file in the folder is damaged.
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
        """Create the folder and claim the files in it. Raises what the class docstring lists."""
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / ".lock"):  # shards start one at a time, to compare their configurations
                    self._claim(cfg, folder, shard)
            except Timeout:
                raise Taken(f"another process writes into {folder}: wait for it, or take another folder") from None

    def _claim(self, cfg: RunConfig, folder: Path, shard: tuple[int, int] | None) -> None:
        """Lock and open the files, check that their rows may be continued, and cut off what a killed process left."""
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
        measured = list(_objects(samples))
        old, end = [line for line, _ in measured], measured[-1][1] if measured else 0
        there_already = len({row.get("sample") for row in [*old, *(row for path in others for row in lines_of(path))]})
        if there_already and not cfg.resume:
            raise Taken(f"{folder} holds {there_already} samples already: give resume=true to continue, or use another folder")
        there = rows_of(folder)
        if there or any(path.exists() and _in_use(path) for path in side_by_side if path != samples):
            if not (folder / "config.yaml").is_file():
                raise Taken(f"{folder} holds samples but no config.yaml: use another folder")
            _compare(config_of(folder), plain(cfg), folder)
        _cut(self._files[0], end)
        status, end = {row["sample"]: row["status"] for row in old}, 0
        for line, behind in _objects(steps):
            end = behind if status.get(line.get("sample")) == "ok" else end
        _cut(self._files[1], end)
        self.done = {row["sample"] for row in there if row["status"] == "ok"}
        if shard is None:
            for path in folder.glob("*.part"):  # left by a process that was killed
                path.unlink()
        write_yaml(folder / "config.yaml", plain(cfg))

    def begin(self) -> None:
        """Note where the rounds of the next sample start in steps.jsonl, for `end` to remove them if it is not ok."""
        self._start = self._files[1].tell() if self._files else 0

    def step(self, line: Mapping[str, Any]) -> None:
        """Append one round to steps.jsonl."""
        if self.folder:
            with writable(self.folder):
                self._files[1].write(json.dumps(line).encode() + b"\n")
                check_there(self._files[1])

    def end(self, row: Mapping[str, Any]) -> None:
        """Append the row of a sample and sync it to disk. Removes the rounds of a sample that is not ok."""
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
        """Close the files and release the lock."""
        for file in self._files:
            with suppress(OSError):  # unwritten data belongs to a sample without a row
                file.close()
        self._files = []
        if self._lock is not None:
            self._lock.release()


def plain(cfg: RunConfig) -> dict[str, Any]:
    """Plain configuration for config.yaml, without the keys that do not change the rows."""
    return {key: value for key, value in config.plain(cfg).items() if key not in NEUTRAL_KEYS}


def _lock_of(samples: Path) -> BaseFileLock:
    """Lock of a samples file. Acquiring it raises Timeout at once if another process holds it."""
    return FileLock(samples.with_name(f".{samples.name}.lock"), timeout=0)


def _in_use(samples: Path) -> bool:
    """Whether another process is writing this samples file."""
    try:
        with _lock_of(samples):
            return False
    except Timeout:
        return True


def _files(folder: Path, what: str) -> list[Path]:
    """Find the files of all shards. what: SAMPLES or STEPS."""
    return sorted(path for path in folder.glob(f"{what}*.jsonl") if re.fullmatch(rf"{what}(\.\d+-of-\d+)?\.jsonl", path.name))


def _objects(path: Path, torn: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each JSON object of a file with the offset of its end in bytes.

    Skips a last line that is not valid JSON, and one without a newline unless `torn` is set and it is an object. Raises
    UserError for any other line that is not a JSON object, and for one that is too long.
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
                raise UserError(f"{path}, line {number}: not a JSON object; move the file away to start over")


def lines_of(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Read the JSON objects of a file of lines; a missing file has none.

    Args:
        path: A .jsonl file. Its last line is skipped if it is not valid JSON, or if it lacks its newline.
        torn: Return a last line without a newline, if it is a JSON object.

    Raises:
        UserError: A line is too long, or a line that is not skipped is not a JSON object.
    """
    return [line for line, _ in _objects(path, torn)]


def _cut(file: BinaryIO, end: int) -> None:
    """Truncate an open file at offset `end` and seek there."""
    file.flush()
    os.ftruncate(file.fileno(), end)
    file.seek(end)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, above: str = "") -> None:
    """Raise Taken for the first key in which two configurations differ. `check` may be added to an old one.

    above: dotted key of the parts compared, with a dot at its end.
    """
    for key in [*old, *(key for key in new if key not in old)]:
        before, now, name = old.get(key), new.get(key), f"{above}{key}"
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            _compare(before, now, folder, f"{name}.")
        elif before != now and name not in NEUTRAL_KEYS and (name, before) != ("check", None):  # check may be added later
            was = f"with {name}={before}" if key in old else f"without {name}"
            has = f"{name}={now}" if key in new else f"without {name}"
            raise Taken(f"{folder} was made {was}, this is {has}: take another folder")
