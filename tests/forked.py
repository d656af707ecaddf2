"""Ranks for tests: forks of this process with torchrun's environment variables, and with everything imported.

Starting torchrun imports torch and Hugging Face once per process, which takes longer than these tests themselves. Where
it matters how torchrun ends ranks, `under_agent` lets torchrun's own agent start them. Tests of the command itself use
the real torchrun.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

import torch
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from specvlm.app.model_cache import MODEL_CACHE


@dataclass(frozen=True)
class Ended:
    """Result of the ranks. codes: exit codes; minus the signal number if a signal ended it. out, err: of all ranks."""

    codes: tuple[int, ...]
    out: str
    err: str

    def lines(self) -> list[str]:
        """Return what specvlm itself printed to stderr."""
        return [line for line in self.err.splitlines() if line.startswith("specvlm:")]


def ranks(action: Callable[[], int | None], folder: Path, seconds: float = 600, size: int = 2) -> Ended:
    """Call `action` in so many ranks; keep their output in `folder`. A hang is an error; no process is left behind."""
    torch.set_num_threads(1)  # a fork has none of the other threads
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    logs = [[folder / f"rank{rank}.{name}" for name in ("out", "err")] for rank in range(size)]
    sys.stdout.flush()
    sys.stderr.flush()
    pids = [_fork(action, rank, size, store.port, logs[rank]) for rank in range(size)]
    codes: dict[int, int] = {}
    deadline = monotonic() + seconds
    while len(codes) < size:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"ranks did not end within {seconds} s: {[log[1].read_text()[-500:] for log in logs]}")
        sleep(0.01)
    out, err = ("".join(log[kind].read_text() for log in logs) for kind in (0, 1))
    return Ended(tuple(codes[pid] for pid in pids), out, err)


def under_agent(action: Callable[[], int | None], folder: Path, size: int = 2) -> Ended:
    """Call `action` in so many ranks started and ended by torchrun's own agent; agent and ranks are forks.

    The code is the agent's: 0 if no rank failed. `folder` keeps the output of all.
    """
    torch.set_num_threads(1)  # a fork has none of the other threads
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=folder.name, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )  # fmt: skip
    logs = [folder / "agent.out", folder / "agent.err"]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _live(lambda: elastic_launch(config, _rank)(action) and None, {}, logs)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended((code,), *(log.read_text() for log in logs))


def _rank(action: Callable[[], int | None]) -> None:
    """Run a rank of the agent, which counts one that returns as done."""
    try:
        code = action()
    except SystemExit as end:
        code = end.code
    if code:
        sys.exit(code)


def _fork(action: Callable[[], int | None], rank: int, size: int, port: int, logs: list[Path]) -> int:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    pid = os.fork()
    if not pid:
        _live(
            action,
            {name: str(value) for name, value in told.items()}
            | {
                "MASTER_ADDR": "127.0.0.1",
                "TORCHELASTIC_RUN_ID": "forked",
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's, as it is torchrun's
            },
            logs,
        )
    return pid


def _live(action: Callable[[], int | None], told: dict[str, str], logs: list[Path]) -> NoReturn:
    """Run `action` in the fork, and never return to the code that forked. told: environment variables."""
    code = 1
    try:
        gc.freeze()  # what waits to be cleared away may wait for a thread, and a fork has none of them
        os.environ |= told
        for path, number in zip(logs, (1, 2), strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        MODEL_CACHE.clear()  # the models of a process that is alone
        code = action() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
