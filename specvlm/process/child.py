"""Run untrusted code in a fork of this process: if it loops, crashes or exhausts memory, only the fork ends.

Time, memory and the size of the result are limited. The code can still use files and the network.
"""

import gc
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from time import monotonic

import psutil

CPU_SECONDS = 5  # limit on CPU time, which other load does not affect
WALL_SECONDS = 60.0  # limit on wall time, for code that waits
MEMORY = 2**29  # limit on memory in bytes, beyond what the process already uses
LONGEST = 2**22  # limit on the result in bytes

_ALONE = Lock()  # one fork at a time: a lock that another thread holds during a fork stays locked in the child


class ChildError(Exception):
    """The code in the child raised an exception, crashed or exceeded a limit; the message says which."""


def in_child(action: Callable[[], str]) -> str:
    """Call `action` in a fork and return its result. If the system cannot fork, call it in this process, unlimited.

    Takes a few milliseconds. The action must not use CUDA or torch's threads.

    Raises:
        ChildError: In the fork, the action raised an exception, crashed or exceeded a limit.
    """
    if not hasattr(os, "fork"):
        return action()
    with _ALONE:
        source, sink = os.pipe()
        collects = gc.isenabled()
        # Off before the fork: in the child, Python runs code of its own before ours, and a finaliser that is called
        # there may wait for a thread that the child does not have.
        gc.disable()
        try:
            pid = os.fork()
            if not pid:
                _answer(action, sink)
        except OSError as error:
            os.close(source)
            os.close(sink)
            raise ChildError(f"the system cannot start a process for it ({error.strerror})") from None
        finally:
            if collects:
                gc.enable()
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
        raise ChildError(f"it does not end within {CPU_SECONDS} s" if slow else "it crashed")
    if said[:1] != b"=":
        raise ChildError(said[1:].decode(errors="replace"))
    return said[1:].decode()


def _answer(action: Callable[[], str], sink: int) -> None:
    """Run the action in the child; never returns. Writes the result after a `=`, or an error after a `!`."""
    try:
        _limit()
        answer = b"=" + action().encode()
    except BaseException as error:
        answer = f"!{type(error).__name__}: {' '.join(str(error).split())[:300]}".encode(errors="replace")
    with suppress(BaseException):
        while answer:
            answer = answer[os.write(sink, answer) :]
    os._exit(0)


def _limit() -> None:
    """Set the child's limits on CPU time and memory."""
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not every system has this limit
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))


def _read(source: int) -> bytes:
    """Read the child's output. Raises ChildError if it takes over WALL_SECONDS or has more than LONGEST bytes."""
    parts: list[bytes] = []
    size, end = 0, monotonic() + WALL_SECONDS
    while True:
        ready, _, _ = select.select([source], [], [], max(0.0, end - monotonic()))
        if not ready:
            raise ChildError(f"it does not end within {WALL_SECONDS:.0f} s")
        part = os.read(source, 2**16)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise ChildError(f"its output has more than {LONGEST:,} bytes")
