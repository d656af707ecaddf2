"""Read samples once for all jobs that share them, and read the next one ahead during decoding."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import torch

from specvlm.app.prepare import Reading
from specvlm.app.request import threads

Read = Callable[[], Reading]


class Readings(AbstractContextManager["Readings"]):
    """Cache of readings by key, plus at most one that a background thread reads ahead.

    Reads one video at a time. Leaving the context waits for a read in progress.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Reading] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[Hashable, Future[Reading]] | None = None
        # Asking also pins this thread's count. Otherwise it would follow the count that the background thread sets.
        self._usual = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable, read: Read) -> Reading:
        """Return the reading of `key`: cached, read ahead, or read now. Raises what `read` raises."""
        if key not in self._held:
            begun, self._ahead = self._ahead, None
            if begun is None or begun[0] != key:
                self._drop(begun)
                self._held[key] = read()
            else:
                self._held[key] = begun[1].result()
        return self._held[key]

    def begin(self, key: Hashable, read: Read, count: int | None) -> None:
        """Start to read `key` in the background, with `count` torch threads; None: as many as when this was created."""
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
        """Drop all cached readings, but not the one that is being read ahead."""
        self._held.clear()

    @staticmethod
    def _drop(begun: tuple[Hashable, Future[Reading]] | None) -> None:
        """Discard a reading that is no longer wanted, such as that of a failed job. Waits for a read in progress."""
        if begun is not None and not begun[1].cancel():
            wait([begun[1]])
