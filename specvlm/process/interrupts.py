"""Ctrl-C: told from a KeyboardInterrupt that a strategy raises itself, and heard although a strategy catches it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from specvlm.errors import ExitCode, line


class _Names(threading.local):
    def __init__(self) -> None:
        self.names: list[str] = []


class Interrupts:
    """heard: how often Ctrl-C came since the command began. installed: is anybody listening? names: of the strategies that a
    thread is in, the innermost last.
    """

    def __init__(self) -> None:
        self.heard, self.installed = 0, False
        self._local = _Names()

    @property
    def names(self) -> list[str]:
        return self._local.names

    @property
    def where(self) -> str:
        """`` in drafter=tree``, the strategy that the calling thread is in; empty outside of one."""
        return f" in {line(self.names[-1])}" if self.names else ""

    def pressed(self, heard: int) -> bool:
        """Was Ctrl-C pressed since so many were heard? Where nobody listens, a KeyboardInterrupt is taken for one."""
        return self.heard > heard or not self.installed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the main thread alone, and only where nobody else listens."""
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
        """The first one interrupts. A second one ends the process: the first may have been caught, or its cleaning up hangs."""
        self.heard += 1
        if self.heard > 1:
            os.write(2, f"specvlm: interrupted{self.where}, and ended at once\n".encode())
            os._exit(ExitCode.INTERRUPTED)
        error = KeyboardInterrupt()
        error.add_note(self.where.strip())
        raise error


INTERRUPTS = Interrupts()
