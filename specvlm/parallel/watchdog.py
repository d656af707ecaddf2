"""Watchdog: exits this rank when a peer dies. A thread waits for the other ranks and torchrun to end.

A collective whose peer died blocks for minutes (NCCL's timeout) or forever (inside a replayed graph), and Python cannot
interrupt it. So the thread exits its own process. Rank 0, or the lowest rank left if rank 0 died, reports in one line
which rank ended and why. The thread also handles torchrun's own death, and the SIGTERM that torchrun sends to the
remaining ranks, which a main thread blocked in a collective would not see.
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

DONE, FAILED, MEMORY, FOLLOWED = "done", "failed", "memory", "followed"  # how a rank ended; unset if it was killed
PATIENCE_S = 3.0  # seconds to wait, after an error or a SIGTERM, to learn whether a dead peer was the cause
HANGS_S = 20.0  # seconds after which a block under `patience` counts as hanging


class Watch:
    """Watches the other ranks and torchrun. Create and close it in the main thread.

    Args:
        store: A torch.distributed store with a connection of its own.
        rank: This process's rank.
        size: Number of ranks.
        save: Called on rank 0 when another rank runs out of memory, to save results. Returns a text to add to the
            message.

    Raises:
        UserError: The system lacks `os.pidfd_open`, which is Linux only. It lets a process wait for the other ranks,
            which are not its children.
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
        self.pipe_out, self.pipe_in = os.pipe()
        os.set_blocking(self.pipe_in, False)
        # The Python handler does nothing: the signal's number is written to the pipe at once.
        self.handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self.old_wakeup_fd = signal.set_wakeup_fd(self.pipe_in)
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop watching and restore the handler of SIGTERM."""
        os.write(self.pipe_in, b"\0")  # not a signal's number
        self.thread.join()
        signal.set_wakeup_fd(self.old_wakeup_fd)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self.handler is None else self.handler)
        for fd in (*self.opened, self.pipe_out, self.pipe_in):
            os.close(fd)

    def ended(self, kind: str = DONE, why: str = "") -> None:
        """Record how this rank ends, for the other ranks. From now on, their deaths no longer end this process.

        Args:
            kind: DONE, FAILED or MEMORY.
            why: Message of the error, if any.
        """
        self.ending.acquire(blocking=False)
        self.store.set(f"ended/{self.rank}", f"{kind} {why}")

    def failed(self, error: BaseException) -> None:
        """Call `ended`, unless a dead peer caused the error: then the thread reports that and exits this process.

        Waits up to twice PATIENCE_S for the thread to find a dead peer.
        """
        if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            self.thread.join(PATIENCE_S)  # a dead peer may have made a collective fail
        if self.rank:
            self.thread.join(PATIENCE_S)  # rank 0 most likely has the same error and reports it
        why = " ".join(str(error).split()) or type(error).__name__
        self.ended(MEMORY if isinstance(error, OutOfMemory) else FAILED, why)

    @contextlib.contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """Run a block that may hang. If it takes over HANGS_S seconds, exit the process with the message `what`."""

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
        """Wait for deaths and signals, until `close`. The thread runs this."""
        poll = select.poll()
        for fd in (self.pipe_out, self.torchrun, *self.there):
            poll.register(fd, select.POLLIN)
        deadline: float | None = None
        while True:
            events = poll.poll(deadline)
            if not events:
                self._follow(ExitCode.TERMINATED)  # no peer died, so the SIGTERM came from outside
            for fd, _ in events:
                if fd == self.pipe_out:
                    received = os.read(self.pipe_out, 64)
                    if 0 in received:
                        return
                    deadline = 1000 * PATIENCE_S if signal.SIGTERM in received else deadline
                    continue
                poll.unregister(fd)
                if fd in self.there:
                    self._gone(self.there.pop(fd))
                elif self.ending.acquire(blocking=False):
                    self._say("torchrun died; the run cannot go on", self.rank == 0)
                    self._exit(ExitCode.LOST)

    def _gone(self, rank: int) -> None:
        """Handle the end of a rank: exit this process too, unless that rank was done, or ended because of another one.

        Does nothing if this process is ending by itself.
        """
        kind, why = self._last_word(rank)
        if kind in (DONE, FOLLOWED) or not self.ending.acquire(blocking=False):
            return  # after FOLLOWED, this rank will also see the death that the other one followed
        if not kind:
            said = f"rank {rank} of {self.size} died without a message: killed, out of the host's memory, or crashed"
            self._say(f"{said}; the run cannot go on", self.rank < min(self.there.values(), default=self.size))
        elif rank and self.rank == 0:  # rank 0 reports its own end itself
            with self.patience("the results so far cannot be saved"):
                saved = self._saved() if kind == MEMORY else ""
            self._say(f"rank {rank} of {self.size} ended: {why}{saved}; the run cannot go on", True)
        self._follow(ExitCode.LOST)

    def _saved(self) -> str:
        """Save the results so far. Returns a text for the message, even if saving fails."""
        try:
            return self.save()
        except Exception as error:  # the thread must still exit the process
            return f"; the results so far cannot be saved ({' '.join(str(error).split())})"

    def _last_word(self, rank: int) -> tuple[str, str]:
        """Read from the store how and why a rank ended; both are empty if it did not say."""
        key = f"ended/{rank}"
        try:
            kind, _, why = (self.store.get(key).decode() if self.store.check([key]) else "").partition(" ")
        except RuntimeError:  # the dead rank hosted the store
            return "", ""
        return kind, why

    def _say(self, line: str, mine: bool) -> None:
        """Print a message if `mine`: only one rank reports."""
        if mine:
            os.write(2, f"specvlm: {line}\n".encode())

    def _follow(self, code: int) -> NoReturn:
        """Exit this process because another one ended, and record that for the other ranks."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"ended/{self.rank}", FOLLOWED)
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """Exit at once, without cleanup: other threads may be blocked in a collective."""
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                sys.stdout.flush()
        os._exit(code)
