"""Remember the results of reading video files, so that an unchanged file need not be decoded again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from threading import Lock
from time import time_ns
from typing import Any, NamedTuple

from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.video_lm import VideoLM
from specvlm.types.pixels import LateVideo, pixel_digest
from specvlm.video.video import Clip, Processed

MOST = 4096  # files that are remembered
RACY_NS = 100_000_000  # a file written this shortly before it is read may be written again and keep the same time stamp


class Known(NamedTuple):
    """Result of reading a file.

    Attributes:
        made: The processed video without its tensors.
        digest: Digest of its pixels.
        vision_rows: Patches in the largest pass of the vision tower.
    """

    made: Processed
    digest: str
    vision_rows: int


class KnownVideos:
    """Maps files to the results of reading them. Threads may share it.

    A file is known by its path, size, times and inode, and by how its frames are sampled and processed. A file that was
    replaced or written is read again.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self._lock = Lock()

    def get(
        self, target: VideoLM, path: Path, how: Hashable, sample: Callable[[], Clip], max_pixels: int | None = None
    ) -> Processed:
        """Return the processed video of a file. If the file is known, its pixels are read only when needed.

        Args:
            target: The target, whose processor is used.
            path: The file.
            how: Everything that `sample` depends on besides target and file.
            sample: Reads the frames.
            max_pixels: As in `VideoLM.prompt`.

        Raises:
            UserError: `sample` or the processor failed. Also when pixels are read later, if the file has changed since.
        """
        key = (identity(path), how, max_pixels, type(target), str(target.folder))

        def read() -> Processed:
            return target.processed(sample(), max_pixels)

        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        if known is not None:
            return late(known, read, partial(self._forget, key))
        found = read()
        if key[0] is not None and key[0] == identity(path):
            self._remember(key, found, target)
        return found

    def _remember(self, key: Hashable, found: Processed, target: VideoLM) -> None:
        small: dict[str, Any] = {name: value for name, value in found.video.items() if not isinstance(value, Tensor)}
        known = Known(found._replace(video=small), pixel_digest(found.video), target.vision_rows(found.video))
        with self._lock:
            self._known[key] = known
            while len(self._known) > MOST:
                self._known.popitem(last=False)

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            self._known.pop(key, None)


def identity(path: Path) -> tuple[Hashable, ...] | None:
    """Return a key for the current content of a file. None if the file is missing, or was written just now."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    if abs(time_ns() - stat.st_mtime_ns) < RACY_NS or abs(time_ns() - stat.st_ctime_ns) < RACY_NS:
        return None
    return os.path.abspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def late(known: Known, read: Callable[[], Processed], forget: Callable[[], None]) -> Processed:
    """Make the processed video of a known file, whose pixels are read only when needed.

    If they have changed by then, the file is forgotten, and reading them raises UserError.
    """

    def pixels() -> dict[str, Any]:
        video = read().video
        if pixel_digest(video) != known.digest:
            forget()
            raise UserError(f"{known.made.source} has changed since it was first read: ask again")
        return video

    return known.made._replace(video=LateVideo(known.made.video, pixels, known.digest, known.vision_rows))
