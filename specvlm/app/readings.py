"""Samples as the target is asked them, read once for all jobs that ask the same; the next one while another is answered."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import torch

from specvlm.app.prepare import Reading
from specvlm.app.request import threads

Read = Callable[[], Reading]


class Readings(AbstractContextManager["Readings"]):
    """Readings by key, and at most one more that is read ahead, in a thread of its own.

    One video is read at a time, here or there. When the context ends, nothing is left running: a reading that has begun
    is waited for.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Reading] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[Hashable, Future[Reading]] | None = None
        # To ask also settles this thread's own number, which otherwise would follow what the other thread sets first.
        self._usual = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable, read: Read) -> Reading:
        """The one that is held, or was read ahead; else it is read now. Raises what reading it raises."""
        if key not in self._held:
            begun, self._ahead = self._ahead, None
            if begun is None or begun[0] != key:
                self._drop(begun)
                self._held[key] = read()
            else:
                self._held[key] = begun[1].result()
        return self._held[key]

    def begin(self, key: Hashable, read: Read, count: int | None) -> None:
        """Read it ahead for `get`, with so many threads of torch's (None: as usual); who decodes keeps its own."""
        if self._ahead is not None and self._ahead[0] == key:
            return
        self._drop(self._ahead)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "read-ahead")

        def work() -> Reading:
            with threads(count or self._usual):
                return read()

        self._ahead = key, self._pool.submit(work)

    def forget(self) -> None:
        """What is held; the one that is read ahead stays."""
        self._held.clear()

    @staticmethod
    def _drop(begun: tuple[Hashable, Future[Reading]] | None) -> None:
        """Nobody will ask for it: its job has failed."""
        if begun is not None and not begun[1].cancel():
            wait([begun[1]])
