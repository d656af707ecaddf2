"""Handle Ctrl-C even if a strategy catches it, and distinguish it from a KeyboardInterrupt that a strategy raises."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from specvlm.errors import ExitCode, line


class _Names(threading.local):
    """Labels, such as "drafter=tree", of the strategies whose code the current thread is running."""

    def __init__(self) -> None:
        self.names: list[str] = []


class Interrupts:
    """Counts presses of Ctrl-C, and knows which strategies each thread is running.

    Attributes:
        heard: How many times Ctrl-C was pressed since the signal handler was last installed.
        installed: Whether the signal handler is installed.
    """

    def __init__(self) -> None:
        self.heard, self.installed = 0, False
        self._local = _Names()

    @property
    def names(self) -> list[str]:
        """Labels of the strategies that the calling thread is running, the innermost last."""
        return self._local.names

    @property
    def where(self) -> str:
        """Text such as `` in drafter=tree``, naming the innermost strategy that the calling thread is running.

        Empty if it runs none.
        """
        return f" in {line(self.names[-1])}" if self.names else ""

    def pressed(self, presses: int) -> bool:
        """Whether Ctrl-C was pressed more than `presses` times.

        Always True while our handler is not installed: presses are not counted then.
        """
        return self.heard > presses or not self.installed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install our handler for this block. Does nothing outside the main thread, or if Python's own was replaced."""
        here = threading.current_thread() is threading.main_thread()
        if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        self.heard, self.installed = 0, True
        signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            self.installed = False
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> NoReturn:
        """Raise KeyboardInterrupt on the first Ctrl-C. Exit on the second: the first was caught, or cleanup hangs."""
        self.heard += 1
        if self.heard > 1:
            os.write(2, f"specvlm: interrupted{self.where}, and ended at once\n".encode())
            os._exit(ExitCode.INTERRUPTED)
        error = KeyboardInterrupt()
        error.add_note(self.where.strip())
        raise error


INTERRUPTS = Interrupts()
