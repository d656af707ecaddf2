"""What tells a rank that another one is gone: a thread that waits for the other processes of this machine to end.

A collective whose partner died waits for minutes (NCCL's timeout) or for ever (inside a replayed graph), and nothing in Python
can interrupt it. So this thread says in one line who ended and why, and ends its own process. It also hears the SIGTERM that
torchrun sends to those that are left, which the main thread, deep in a collective, would not.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

LOST, TERMINATED = 4, 143  # exit codes
DONE = "done"
PATIENCE_S = 3.0  # between torchrun's SIGTERM and the news of who caused it
HANGS_S = 20.0


class Watch:
    """store: torch.distributed's, of a connection of its own. To be made in the main thread, on Linux, which alone can wait for
    the end of a process that is no child.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        store.set(f"pid/{rank}", str(os.getpid()))
        pids = {other: int(store.get(f"pid/{other}")) for other in range(size) if other != rank}
        self.there = {os.pidfd_open(pid): other for other, pid in pids.items()}
        self.ending = threading.Lock()
        hears, tells = os.pipe()
        os.set_blocking(tells, False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # Python's own part; the pipe hears of it at once
        signal.set_wakeup_fd(tells)
        self.mine: str | None = None
        self.thread = threading.Thread(target=self._wait, args=(hears,), daemon=True)
        self.thread.start()

    def ended(self, why: str = DONE) -> None:
        """For the others, before this process ends: its last word. From now on this rank's own end is its own affair."""
        self.ending.acquire(blocking=False)
        self.store.set(f"ended/{self.rank}", why)

    def failed(self, why: str, surely_own: bool) -> None:
        """`ended`, unless this is what another rank's end does to a collective: then the thread says whose, and exits."""
        self.mine = why
        told = [other for other in range(self.size) if other != self.rank and self.store.check([f"ended/{other}"])]
        if told or self.rank or not surely_own:  # the first rank most likely met the same mistake, and says it itself
            self.thread.join(3 * PATIENCE_S if told else PATIENCE_S)
        self.ended(why)

    @contextlib.contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """For what may hang: it has a few seconds, then this process ends with a line that says what it was."""

        def give_up() -> None:
            os.write(2, f"specvlm: rank {self.rank} of {self.size}: {what}\n".encode())
            self._exit(LOST)

        timer = threading.Timer(HANGS_S, give_up)
        timer.daemon = True
        timer.start()
        yield
        timer.cancel()

    def _wait(self, hears: int) -> None:
        poll = select.poll()
        for fd in (hears, *self.there):
            poll.register(fd, select.POLLIN)
        deadline: float | None = None
        while True:
            events = poll.poll(deadline)
            if not events:
                self._exit(TERMINATED)  # from outside, not because of another rank
            for fd, _ in events:
                if fd in self.there:
                    poll.unregister(fd)
                    self._gone(self.there.pop(fd))
                elif signal.SIGTERM in os.read(hears, 64):
                    deadline = 1000 * PATIENCE_S

    def _gone(self, rank: int) -> None:
        """Says so, if it was not done, from the first rank that is left; and ends this process."""
        try:
            key = f"ended/{rank}"
            why = self.store.get(key).decode() if self.store.check([key]) else ""
        except RuntimeError:  # the store was the dead one's
            why = ""
        if why == DONE or not self.ending.acquire(blocking=False):
            return
        if why != self.mine and self.rank < min(self.there.values(), default=self.size):
            said = f"ended: {why}" if why else "died without a word: killed, out of the host's memory, or crashed"
            os.write(2, f"specvlm: rank {rank} of {self.size} {said}; the run cannot go on\n".encode())
        self._exit(LOST)

    def _exit(self, code: int) -> NoReturn:
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                sys.stdout.flush()
        os._exit(code)
