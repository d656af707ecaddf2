"""What tells a rank that another one is gone: a thread that waits for the other processes of this machine to end.

A collective whose partner died waits for minutes (NCCL's timeout) or for ever (inside a replayed graph), and nothing in Python
can interrupt it. So this thread ends its own process; the first rank, or the lowest left where that is the dead one, says in
one line who ended and why. It also hears the SIGTERM that torchrun sends to those that are left, which the main thread, deep in
a collective, would not, and the end of torchrun itself.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from specvlm.errors import ExitCode, OutOfMemory, UserError

DONE, FAILED, MEMORY, FOLLOWED = "done", "failed", "memory", "followed"  # kinds of ending; one that was killed has said none
PATIENCE_S = 3.0  # between what an end does to a collective, or to torchrun, and the news of whose it was
HANGS_S = 20.0  # what takes as long does not come back


class Watch:
    """store: torch.distributed's, of a connection of its own. save: called on the first rank where another one runs out of
    memory; what it returns ends the line. To be made in the main thread, and closed there.

    Raises UserError where there is no waiting for the end of a process that is no child: outside Linux.
    """

    def __init__(self, store: Any, rank: int, size: int, save: Callable[[], str] = str) -> None:
        if not hasattr(os, "pidfd_open"):
            raise UserError("parallel=tensor needs Linux, to notice when a rank dies (os.pidfd_open): use one process")
        self.store, self.rank, self.size, self.save = store, rank, size, save
        self.torchrun = os.pidfd_open(os.getppid())
        store.set(f"pid/{rank}", str(os.getpid()))
        pids = {other: int(store.get(f"pid/{other}")) for other in range(size) if other != rank}
        self.there = {os.pidfd_open(pid): other for other, pid in pids.items()}
        self.opened = [self.torchrun, *self.there]
        self.ending = threading.Lock()
        self.hears, self.tells = os.pipe()
        os.set_blocking(self.tells, False)
        # Python's own part of a signal does nothing; the pipe hears of it at once.
        self.handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self.wakes = signal.set_wakeup_fd(self.tells)
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Watch no longer, and leave signals as they were."""
        os.write(self.tells, b"\0")  # no signal's number
        self.thread.join()
        signal.set_wakeup_fd(self.wakes)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self.handler is None else self.handler)
        for fd in (*self.opened, self.hears, self.tells):
            os.close(fd)

    def ended(self, kind: str = DONE, why: str = "") -> None:
        """For the others, before this process ends: its last word. From now on this rank's own end is its own affair."""
        self.ending.acquire(blocking=False)
        self.store.set(f"ended/{self.rank}", f"{kind} {why}")

    def failed(self, error: BaseException) -> None:
        """`ended`, unless another rank's end is behind the error: then the thread says so, and ends this process."""
        if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            self.thread.join(PATIENCE_S)  # it may be what another's end does to a collective
        if self.rank:
            self.thread.join(PATIENCE_S)  # the first rank most likely met the same, and says it
        why = " ".join(str(error).split()) or type(error).__name__
        self.ended(MEMORY if isinstance(error, OutOfMemory) else FAILED, why)

    @contextlib.contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """For what may hang: it has a few seconds, then this process ends with a line that says what it was."""

        def give_up() -> None:
            os.write(2, f"specvlm: rank {self.rank} of {self.size}: {what}\n".encode())
            self._exit(ExitCode.LOST)

        timer = threading.Timer(HANGS_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _wait(self) -> None:
        poll = select.poll()
        for fd in (self.hears, self.torchrun, *self.there):
            poll.register(fd, select.POLLIN)
        deadline: float | None = None
        while True:
            events = poll.poll(deadline)
            if not events:
                self._follow(ExitCode.TERMINATED)  # from outside, not because of another rank
            for fd, _ in events:
                if fd == self.hears:
                    heard = os.read(self.hears, 64)
                    if 0 in heard:
                        return
                    deadline = 1000 * PATIENCE_S if signal.SIGTERM in heard else deadline
                    continue
                poll.unregister(fd)
                if fd in self.there:
                    self._gone(self.there.pop(fd))
                elif self.ending.acquire(blocking=False):
                    self._say("torchrun died; the run cannot go on", self.rank == 0)
                    self._exit(ExitCode.LOST)

    def _gone(self, rank: int) -> None:
        """Ends this process, if that rank was not done."""
        kind, why = self._last_word(rank)
        if kind in (DONE, FOLLOWED) or not self.ending.acquire(blocking=False):
            return  # whoever it followed, this rank will hear of as well
        if not kind:
            said = f"rank {rank} of {self.size} died without a word: killed, out of the host's memory, or crashed"
            self._say(f"{said}; the run cannot go on", self.rank < min(self.there.values(), default=self.size))
        elif rank and self.rank == 0:  # of its own end the first rank speaks itself
            with self.patience("what was done cannot be saved"):
                saved = self._saved() if kind == MEMORY else ""
            self._say(f"rank {rank} of {self.size} ended: {why}{saved}; the run cannot go on", True)
        self._follow(ExitCode.LOST)

    def _saved(self) -> str:
        try:
            return self.save()
        except Exception as error:  # nothing of it shall keep this thread from ending the process
            return f"; what was done cannot be saved ({' '.join(str(error).split())})"

    def _last_word(self, rank: int) -> tuple[str, str]:
        key = f"ended/{rank}"
        try:
            kind, _, why = (self.store.get(key).decode() if self.store.check([key]) else "").partition(" ")
        except RuntimeError:  # the store was the dead one's
            return "", ""
        return kind, why

    def _say(self, line: str, mine: bool) -> None:
        if mine:
            os.write(2, f"specvlm: {line}\n".encode())

    def _follow(self, code: int) -> NoReturn:
        """End this process because of another one's end."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"ended/{self.rank}", FOLLOWED)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                sys.stdout.flush()
        os._exit(code)
