"""Run what a stranger wrote in a fork of this process: it may loop, crash or take memory, and only the fork ends."""

import gc
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from time import monotonic

import psutil

SECONDS = 5  # of the processor: a busy machine takes longer
PATIENCE = 60.0  # seconds on the clock, for what waits instead of working
MEMORY = 2**29  # bytes beside what the process has already
LONGEST = 2**22  # characters of an answer

_ALONE = Lock()  # a lock that another thread holds at a fork is never let go in it: so no two of ours at once


class ChildError(Exception):
    """It raised, took too long, or too much; says which."""


def in_child(action: Callable[[], str]) -> str:
    """What `action` returns, called in a fork. Where a system cannot fork, it is called here.

    Costs some milliseconds. The fork may use Python and what is in memory, not CUDA, not torch's threads.
    Raises ChildError.
    """
    if not hasattr(os, "fork"):
        return action()
    with _ALONE:
        source, sink = os.pipe()
        pid = os.fork()
        if not pid:
            _answer(action, sink)
        os.close(sink)
        try:
            said = _read(source)
        finally:
            os.close(source)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
    if not said:
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        raise ChildError(f"it does not end within {SECONDS} s" if slow else "it crashed")
    if said[:1] != b"=":
        raise ChildError(said[1:].decode(errors="replace"))
    return said[1:].decode()


def _answer(action: Callable[[], str], sink: int) -> None:
    """The fork's own life; it never returns. The first byte says whether an answer or an error follows."""
    try:
        gc.disable()  # what it would clear away may wait for a thread, and a fork has none of them
        _limit()
        answer = b"=" + action().encode()
    except BaseException as error:
        answer = f"!{type(error).__name__}: {' '.join(str(error).split())[:300]}".encode(errors="replace")
    with suppress(BaseException):
        while answer:
            answer = answer[os.write(sink, answer) :]
    os._exit(0)


def _limit() -> None:
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not every system has this limit
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))


def _read(source: int) -> bytes:
    """All that the fork writes. Raises ChildError where that takes too long, or is too much."""
    parts: list[bytes] = []
    size, end = 0, monotonic() + PATIENCE
    while True:
        ready, _, _ = select.select([source], [], [], max(0.0, end - monotonic()))
        if not ready:
            raise ChildError(f"it does not end within {PATIENCE:.0f} s")
        part = os.read(source, 2**16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise ChildError(f"it makes more than {LONGEST:,} characters")
