"""Handle Ctrl-C, even if a strategy catches it, and tell it from a KeyboardInterrupt that a strategy raises."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from specvlm.errors import ExitCode, line


class _Names(threading.local):
    """Names of the strategies that the current thread is in."""

    def __init__(self) -> None:
        self.names: list[str] = []


class Interrupts:
    """Counts presses of Ctrl-C, and knows which strategies each thread is in.

    Attributes:
        heard: How often Ctrl-C was pressed since the command began.
        installed: Whether the signal handler is installed.
    """

    def __init__(self) -> None:
        self.heard, self.installed = 0, False
        self._local = _Names()

    @property
    def names(self) -> list[str]:
        """Strategies that the calling thread is in, the innermost last."""
        return self._local.names

    @property
    def where(self) -> str:
        """Text such as `` in drafter=tree``, naming the strategy that the calling thread is in; empty outside."""
        return f" in {line(self.names[-1])}" if self.names else ""

    def pressed(self, heard: int) -> bool:
        """Whether Ctrl-C was pressed more than `heard` times. Without a handler, any KeyboardInterrupt counts."""
        return self.heard > heard or not self.installed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install the handler for this block, if in the main thread and if nobody else has installed one."""
        here = threading.current_thread() is threading.main_thread()
        if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        self.heard, self.installed = 0, True
        signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            self.installed = False
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hear(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Interrupt on the first Ctrl-C. Exit on the second: the first may have been caught, or its cleanup hangs."""
        self.heard += 1
        if self.heard > 1:
            os.write(2, f"specvlm: interrupted{self.where}, and ended at once\n".encode())
            os._exit(ExitCode.INTERRUPTED)
        error = KeyboardInterrupt()
        error.add_note(self.where.strip())
        raise error


INTERRUPTS = Interrupts()
