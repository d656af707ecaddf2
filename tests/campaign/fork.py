"""A fork server: specvlm is imported and its models loaded once, and each attack runs in a fork of this process."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPECVLM_PLUGINS": ""}

CRASHED = 99  # the exit code of an action that raised what nobody caught
HANG_S, CPU_S = 60, 10  # a case that takes longer hangs: of the clock, which a busy machine stretches, and of the processor
LONGEST_LINE = 600  # of an error message


@dataclass(frozen=True)
class Ended:
    """What became of a child. code: as a shell's, minus the signal's number where one ended it, None where it hung."""

    code: int | None
    out: str
    err: str
    cpu_s: float
    peak_mb: int

    def faults(self, allowed: Collection[int] = (0, 2, 5)) -> list[str]:
        """What is wrong with how it ended: a crash, a hang, more than one line for a mistake."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        found = []
        if self.code is None or self.cpu_s > CPU_S:
            found.append(f"hung ({self.cpu_s:.0f} s of the processor)")
        elif self.code not in allowed:
            found.append(f"exit code {self.code}")
        if "Traceback" in self.err + self.out:
            found.append("traceback")
        if self.code == 2 and (len(lines) != 1 or len(lines[0]) > LONGEST_LINE):
            found.append(f"{len(lines)} lines on stderr, the longest of {max(map(len, lines), default=0)} characters")
        return [f"{fault}; stderr ends {self.err[-300:]!r}" for fault in found]


class Child:
    """A fork that calls `action` in a folder of its own and ends with the exit code that it returns."""

    def __init__(self, action: Callable[[], int], folder: Path, memory_gb: int | None = 12) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _live(action, folder, memory_gb)

    def poll(self) -> Ended | None:
        """None while it runs."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        return self._ended(os.waitstatus_to_exitcode(status), used) if pid else None

    def wait(self, seconds: float = HANG_S) -> Ended:
        """A child that has not ended by then is killed."""
        deadline = monotonic() + seconds
        while monotonic() < deadline:
            if ended := self.poll():
                return ended
            sleep(0.01)
        self.signal(signal.SIGKILL)
        _, _, used = os.wait4(self.pid, 0)
        return self._ended(None, used)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def _ended(self, code: int | None, used: resource.struct_rusage) -> Ended:
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(code, out, err, used.ru_utime + used.ru_stime, used.ru_maxrss >> 10)


def _live(action: Callable[[], int], folder: Path, memory_gb: int | None) -> NoReturn:
    """The child's own life: it never returns into the code that forked it."""
    code = CRASHED
    try:
        gc.freeze()  # what waits to be cleared away may wait for a thread, and a fork has none of them
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_gb:
            resource.setrlimit(resource.RLIMIT_AS, (memory_gb << 30, memory_gb << 30))
        for path, mode, number in ((os.devnull, os.O_RDONLY, 0), ("out", os.O_WRONLY, 1), ("err", os.O_WRONLY, 2)):
            os.dup2(os.open(folder / path, mode | (os.O_CREAT if number else 0)), number)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = action()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # whatever the action made of the streams
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def specvlm(*words: object) -> Callable[[], int]:
    """The command line with these words, as an action."""
    from specvlm.__main__ import main

    return lambda: main([str(word) for word in words])


@cache
def preload() -> None:
    """Import what the command line imports and load the models of the default pair, for every fork to find there."""
    import torch

    torch.set_num_threads(1)  # a fork has none of the other threads
    with tempfile.TemporaryDirectory() as folder:
        words = ("frames=4", "max_new_tokens=3", "baseline=false", f"hydra.run.dir={folder}/run")
        with redirect_stdout(io.StringIO()):
            assert specvlm(*words)() == 0
