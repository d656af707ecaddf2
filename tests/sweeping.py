"""Sweeps for tests: short questions about few frames of synthetic scenes, and a data set and strategies that fail."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.config_store import ConfigStore

from specvlm.__main__ import main
from specvlm.results.rows import rows_of, steps_of
from specvlm.strategies import Dataset, Pruner, Sample, plugins, registry
from specvlm.strategies.datasets.synthetic import clip
from specvlm.strategies.plugins import Plugin
from specvlm.video.clips import find_clip

ASK = ["dataset=synthetic", "dataset.ask=question", "frames=4", "max_new_tokens=12"]
TIMES = ("_s", "tokens_per_second", "peak_memory_bytes", "speedup_decode", "speedup_end_to_end", "speedup_file_to_last_token")


@dataclass(frozen=True)
class BrokenDataset(Dataset):
    """A scene, a truncated file, a missing file, and another scene."""

    name = "broken"
    folder: str = "videos"

    def samples(self) -> Sequence[Sample]:
        question, folder = "how many objects appear ?", Path(self.folder)
        videos = (lambda: clip(0), folder / "cut.mp4", folder / "missing.mp4", lambda: clip(1))
        return [Sample(f"s{number}", video, question) for number, video in enumerate(videos)]


@dataclass(frozen=True)
class RaisingPruner(Pruner):
    """Pruner that fails on every video."""

    name = "raising"

    def select(self, ctx):
        raise ZeroDivisionError("the pruner divides by zero")


def install(monkeypatch) -> None:
    """Install both as a plugin."""
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda: [*load(), Plugin("specvlm-wrong", "1", (BrokenDataset, RaisingPruner))])
    registry.collect.cache_clear()


def uninstall() -> None:
    registry.collect.cache_clear()
    for group, name in (("dataset", "broken"), ("pruner", "raising")):
        ConfigStore.instance().repo.get(group, {}).pop(f"{name}.yaml", None)


def videos(folder: Path) -> Path:
    folder.mkdir()
    whole = find_clip("synthetic_1").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


def untimed(value):
    """Remove figures that differ between any two runs."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if not key.endswith(TIMES)}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def jobs(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.yaml"))}


def table(folder: Path) -> dict[str, tuple]:
    """Return rows and rounds of every job of a sweep, without times."""
    return {name: (untimed(rows_of(job)), untimed(steps_of(job))) for name, job in jobs(folder).items()}


def finished(folder: str, *words: str) -> Path:
    """Return a copy of a finished job folder, or of a sweep's with -m; made once per process."""
    return Path(shutil.copytree(Path(_finished(words).name, "out"), folder))


@cache
def _finished(words: tuple[str, ...]) -> TemporaryDirectory[str]:
    made = TemporaryDirectory(prefix="specvlm-tests-")
    key = "hydra.sweep.dir" if words[0] == "-m" else "hydra.run.dir"
    assert main([*words, f"{key}={made.name}/out"]) == 0
    return made


def start(words: Sequence[str], log: str = "log.txt") -> int:
    """Start the command in a process of its own, with everything imported. Returns its id; appends output to `log`."""
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # what waits to be cleared away may wait for a thread, and a fork has none of them
        kept = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(kept, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        code = 99
        try:
            code = main(list(words))
        finally:
            os._exit(code)
    return pid


def end(pid: int, seconds: float | None = None) -> int:
    """Wait for a process and return its exit code; send SIGKILL after so many seconds, which gives -9."""
    stop = time.monotonic() + (seconds or 600)
    while time.monotonic() < stop:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
