"""Video decoders behind one small interface: decord (the default) and PyAV, both imported only when used.

A reader knows a file's frames by their place in display order, and decodes the ones asked for by seeking to the
key frame before each. Every fault of the file ends as one ``UserError``.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specvlm.data.container import is_mpeg_stream
from specvlm.errors import UserError

_CHUNK = 16  # frames decoded at a time: the copies a backend makes stay small beside the result


class Reader(Protocol):
    """An open video. ``times``: seconds of each frame after the first; ``fps``: the rate the container names, or 0."""

    times: tuple[float, ...]
    fps: float

    def __init__(self, path: Path) -> None: ...

    def decode(self, index: Sequence[int]) -> Tensor:
        """Return the frames at strictly ascending places, uint8 (n, 3, H, W), turned upright."""

    def close(self) -> None:
        """Let go of the file."""


class DecordReader:
    """decord 0.6: no AV1, no GIF, wheels for x86-64 only.

    Its seeks are exact where no frame refers across a key frame. In files with open groups of pictures (the default of
    x265 and of MPEG-2) it takes a key frame's place in the file for its place in time, and gives neighbours: these are
    read without seeking. PyAV tells which they are; where PyAV is not installed, such files are read inexactly.
    """

    def __init__(self, path: Path) -> None:
        try:
            import decord
        except ImportError:
            raise UserError('reader "decord" is not installed: pip install decord, or try reader=pyav') from None
        if is_mpeg_stream(path):  # even a seek to the first frame lands elsewhere
            raise UserError(f"{path} is an MPEG transport or program stream, which decord misreads: try reader=pyav")
        self._path = path
        self._errors = (decord.DECORDError, RuntimeError, IndexError)
        decord.logging.set_level(decord.logging.QUIET)
        try:
            with _quiet_stderr():
                self._video: Any = decord.VideoReader(str(path))
            spans = self._video.get_frame_timestamp(list(range(len(self._video))))
        except self._errors as error:
            if "st_nb" in str(error):
                raise UserError(
                    f"{path} has no video stream that decord can decode (only sound, no frames, or a codec"
                    " it lacks, such as AV1): try reader=pyav"
                ) from None
            if "frame-count" in str(error):
                raise UserError(f"{path} is an image, or of a format that decord cannot index: try reader=pyav") from None
            raise UserError(f"{path} is damaged or not a video: decord cannot read it") from None
        self.times = tuple(float(start) for start in spans[:, 0])
        self.fps = float(self._video.get_avg_fps())

    def decode(self, index: Sequence[int]) -> Tensor:
        try:
            with _quiet_stderr():
                return _fill(self._walk(index) if self._open_gop() else self._jump(index), len(index))
        except self._errors:
            raise UserError(f"{self._path} is damaged or not a video: decord cannot decode its frames") from None

    def close(self) -> None:
        self._video = None

    def _jump(self, index: Sequence[int]) -> Iterator[Tensor]:
        for first in range(0, len(index), _CHUNK):
            batch = self._video.get_batch(list(index[first : first + _CHUNK]))
            yield torch.from_numpy(batch.asnumpy())

    def _walk(self, index: Sequence[int]) -> Iterator[Tensor]:
        self._video.seek(0)
        place = 0
        for wanted in index:
            for _ in range(wanted - place):  # skip_frames would seek
                self._video.next()
            yield torch.from_numpy(self._video.next().asnumpy())[None]
            place = wanted + 1

    def _open_gop(self) -> bool:
        with suppress(UserError):  # PyAV is not installed, or cannot read what decord could
            reader = PyavReader(self._path)
            reader.close()
            return reader.open_gop
        return False


class PyavReader:
    """PyAV: every codec of FFmpeg. Finds frames by time stamp, so that a seek which lands elsewhere is noticed."""

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError:
            raise UserError('reader "pyav" is not installed: pip install av') from None
        self._path = path
        self._error: type[Exception] = av.FFmpegError
        try:
            self._container: Any = av.open(str(path), metadata_errors="replace")
            self._index()
        except self._error:
            raise UserError(f"{path} is damaged or not a video: PyAV cannot read it") from None

    def decode(self, index: Sequence[int]) -> Tensor:
        try:
            return _fill((_upright(frame, self._path)[None] for frame in self._frames(index)), len(index))
        except self._error:
            raise UserError(f"{self._path} is damaged: PyAV cannot decode its frames") from None

    def close(self) -> None:
        self._container.close()

    def _index(self) -> None:
        kind = self._container.format.name
        if kind.endswith("_pipe") or kind in ("image2", "tty"):
            raise UserError(f"{self._path} is {'a text' if kind == 'tty' else 'an image'}, not a video")
        if not self._container.streams.video:
            raise UserError(f"{self._path} has no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise UserError(f"{self._path} uses a video codec that this PyAV cannot decode")
        self._stream.thread_type = "AUTO"
        packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if p.size and not p.is_discard]
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate or 0)
        self._stamps: list[int] = []  # empty: frames are counted from the start, never sought
        self._keys, self.open_gop = [0], False
        if any(pts is None for pts, _ in packets):  # raw streams
            self.times = tuple(place / float(rate or 25) for place in range(len(packets)))
            return
        stamps = sorted(pts for pts, _ in packets)
        self.times = tuple(float((pts - stamps[0]) * self._stream.time_base) for pts in stamps)
        if kind not in ("mpeg", "mpegts"):  # after a seek in these, frames carry other time stamps than before
            self._stamps = stamps
            self._keys = sorted({0, *(bisect_right(stamps, pts) - 1 for pts, key in packets if key)})
            self.open_gop = _has_leading_frames(packets)

    def _frames(self, index: Sequence[int]) -> Iterator[Any]:
        place, frames = 0, self._from(0)
        for wanted in index:
            key = self._keys[bisect_right(self._keys, wanted) - 1]
            if key > place:  # a key frame lies ahead: jumping to it costs less than decoding up to it
                frames = self._from(key)
            frame = self._advance(frames, wanted)
            if frame is None and key:  # a seek may land too late in streams without an index: start over
                frames = self._from(0)
                frame = self._advance(frames, wanted)
            if frame is None:
                raise UserError(f"{self._path} is damaged: PyAV cannot decode frame {wanted}")
            yield frame
            place = wanted + 1

    def _from(self, key: int) -> Iterator[tuple[int, Any]]:
        """Seek to a key frame; yield (time stamp or count, frame) from there on."""
        self._container.seek(self._stamps[key] if self._stamps else 0, stream=self._stream)
        for count, frame in enumerate(self._container.decode(self._stream)):
            yield (frame.pts if self._stamps else count), frame

    def _advance(self, frames: Iterator[tuple[int, Any]], wanted: int) -> Any:
        stamp = self._stamps[wanted] if self._stamps else wanted
        for found, frame in frames:
            if found is not None and found >= stamp:
                return frame if found == stamp else None
        return None


READERS: dict[str, type[Reader]] = {"decord": DecordReader, "pyav": PyavReader}


def _has_leading_frames(packets: Iterable[tuple[int, bool]]) -> bool:
    """Whether a frame stored after a key frame is shown before it: an open group of pictures."""
    key = None
    for pts, is_key in packets:
        if is_key:
            key = pts
        elif key is not None and pts < key:
            return True
    return False


def _fill(batches: Iterable[Tensor], count: int) -> Tensor:
    """Copy batches (n, H, W, 3) into one tensor (count, 3, H, W), without holding them all beside it."""
    out, done = torch.empty(0), 0
    for batch in batches:
        if not done:
            out = torch.empty(count, 3, *batch.shape[1:3], dtype=torch.uint8)
        if batch.shape[1:3] != out.shape[2:]:
            raise UserError(f"the picture size changes within the video, to {batch.shape[2]}x{batch.shape[1]}")
        out[done : done + len(batch)] = batch.permute(0, 3, 1, 2)
        done += len(batch)
    return out


def _upright(frame: Any, path: Path) -> Tensor:
    """Turn one PyAV frame into RGB (H, W, 3), rotated as its display matrix asks."""
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise UserError(f"{path} is to be shown rotated by {frame.rotation} degrees; only multiples of 90 are supported")
    return torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy())


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send the process's stderr nowhere: decord's C++ code writes there before it raises, at any log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
