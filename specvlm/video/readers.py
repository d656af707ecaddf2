"""Video readers behind one small interface: PyAV, and decord if PyAV is missing or decord is asked for.

With PyAV installed, decord is used only for files of which it gives the same frames as FFmpeg shows. PyAV's reader
takes the numbers and times of frames from `frame_index`; decord's are compared with it if PyAV is installed. Problems
with a file raise ``UserError``; frames that differ from the index raise ``WrongIndex``.
"""

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from specvlm.errors import UserError
from specvlm.video.av_file import Orientation, WrongIndex, frames_of, opened
from specvlm.video.container import declared_size, truncated
from specvlm.video.decord_process import DecordFailed, DecordProcess
from specvlm.video.frame_index import FrameIndex, index_of
from specvlm.video.pictures import Pictures

NAMES = ("auto", "decord", "pyav")
MOST_DECODERS = 16  # maximum number of decoders in parallel
DECODER_BYTES = 256 * 2**20  # memory for the pictures of all decoders
HELD = 20  # pictures that a decoder holds: those that others refer to, and those that wait for output
LEAST_SIDE = 32  # pixels: decord adds columns to narrower pictures
# Pixel formats that decord converts to the same colours as the ffmpeg tool.
DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


class Reader(Protocol):
    """A video file whose frames can be decoded by number.

    Attributes:
        times: Time of each frame, in seconds since the first.
        fps: Frames per second that the container states, or that decord reports; 0 if unknown.
        name: Name of the reader.
        reason: Why this reader was chosen.
    """

    times: tuple[float, ...]
    fps: float
    name: str
    reason: str

    def decode(self, index: Sequence[int]) -> Tensor:
        """Decode frames.

        Args:
            index: Numbers of the frames, strictly ascending.

        Returns:
            (n, 3, H, W) uint8 RGB, upright.

        Raises:
            WrongIndex: The file decodes to other frames than its `FrameIndex` lists.
            UserError: The file is damaged, its picture size changes, or there is not enough memory.
        """


def open_reader(path: Path, name: str = "auto", counted: bool = False) -> Reader:
    """Open a video file.

    Args:
        path: A regular file.
        name: "pyav"; "decord", which falls back to PyAV if decord fails on the file or would give other frames than
            those shown; or "auto", which is PyAV if it is installed, else decord.
        counted: True to count the frames by decoding them, after `decode` raised WrongIndex. Ignored without PyAV.

    Raises:
        UserError: The reader is not installed, or the file is damaged, not a video, or of a kind that cannot be read.
    """
    if importlib.util.find_spec("av") is None:
        if name == "pyav":
            raise UserError('reader "pyav" is not installed: pip install av')
        return _decord_alone(path)
    index = index_of(path, counted)
    if name != "decord":
        return PyavReader(path, index, "as asked" if name == "pyav" else "reads every file, and long ones faster than decord")
    if reason := _not_for_decord(index):
        return PyavReader(path, index, reason)
    try:
        return DecordReader(path, index, "as asked")
    except DecordFailed as error:
        return PyavReader(path, index, str(error))


def _not_for_decord(index: FrameIndex) -> str:
    """Say why decord would not give the frames that are shown; empty if no reason is known. Does not run decord."""
    if index.stamps is None:
        return "the frames of this file must be counted, which decord does not do"
    if index.facts.kind == "flv" or min(index.facts.width, index.facts.height) < LEAST_SIDE:
        return "decord gives wrong pictures of such files"
    if index.facts.width % 2 or index.facts.height % 2:
        return "decord does not crop to odd sizes"
    if index.facts.streams > 1:
        return "decord may choose another one of several video streams"
    if index.facts.orientation != Orientation():
        return "decord does not rotate every kind of file"
    if index.packets.open_gop or not index.packets.whole:
        return "frames refer across key frames, where decord's seeks are not exact"
    if index.facts.pixels not in DECORD_PIXELS:
        return f"decord converts {index.facts.pixels} differently"
    return "" if index.packets.steady else "the picture size may change, and decord would scale the pictures"


class PyavReader:
    """Reads videos with PyAV, which decodes with FFmpeg.

    For each wanted frame, decoding starts at the key frame before it. Several groups of pictures, each from one key
    frame to the next, are decoded in parallel. In H.264, unwanted frames that no other refers to are skipped. Frames
    that fail are tried again with errors ignored. Those that still are doubtful, and all frames of a file whose frames
    were counted, are decoded from the start of the file.
    """

    name = "pyav"

    def __init__(self, path: Path, index: FrameIndex, reason: str) -> None:
        self._path, self._index, self.reason = path, index, reason
        self.times, self.fps = index.times, index.facts.fps

    def decode(self, index: Sequence[int]) -> Tensor:
        pictures = Pictures(self._path, len(index), self._index.facts.orientation)
        if self._index.stamps is None:
            self._walk({frame: place for place, frame in enumerate(index)}, pictures, by_stamp=False)
            return pictures.pixels
        wanted = {self._index.stamps[frame]: place for place, frame in enumerate(index)}
        groups: dict[int | None, list[int]] = {}
        for stamp in wanted:
            groups.setdefault(self._index.entries.before(stamp), []).append(stamp)
        missing = groups.pop(None, []) + self._side_by_side(groups, wanted, pictures)
        if missing:
            self._walk({stamp: wanted[stamp] for stamp in missing}, pictures, by_stamp=True)
        return pictures.pixels

    def _side_by_side(self, groups: Mapping[Any, list[int]], wanted: Mapping[int, int], pictures: Pictures) -> list[int]:
        """Decode groups of pictures in parallel. Returns the time stamps of the frames that failed.

        Args:
            groups: Time stamps of the wanted frames, by the number of the key frame before them (see `Entries`).
            wanted: Place in the result, by time stamp.
            pictures: The result.
        """
        todo, stop = deque(groups.items()), Event()
        held = HELD * self._index.facts.width * self._index.facts.height * 3 // 2
        cores = _cores()
        decoders = min(cores, len(todo), MOST_DECODERS, max(DECODER_BYTES // held, 1))

        def work(_: int) -> list[int]:
            missing = []
            # explode: raise on damage that the decoder would conceal, which may look different if decoding starts here
            with opened(self._path, cores // decoders, err_detect="explode") as (container, stream):
                group = Group(container, stream, self._index, stop)
                while not stop.is_set():
                    try:
                        key, stamps = todo.popleft()
                    except IndexError:
                        break
                    lost = group.decode(key, stamps, lambda stamp, frame: pictures.put(wanted[stamp], frame))
                    missing += self._twice(key, lost, wanted, pictures, stop) if lost else []
            return missing

        if decoders <= 1:
            return work(0) if todo else []
        with ThreadPoolExecutor(decoders) as pool:
            try:
                return [stamp for missing in pool.map(work, range(decoders)) for stamp in missing]
            finally:
                stop.set()  # stop all threads after an error or Ctrl-C

    def _twice(self, key: int, stamps: Sequence[int], wanted: Mapping[int, int], pictures: Pictures, stop: Event) -> list[int]:
        """Decode frames twice with errors ignored: from their key frame, and from the one before it.

        Many errors are harmless: pictures that are the same both times are stored, since decoding from the start of the
        file should give them, too. Returns the time stamps of the others.
        """

        def decoded(start: int) -> dict[int, np.ndarray[Any, Any]]:
            found: dict[int, np.ndarray[Any, Any]] = {}

            def put(stamp: int, frame: Any) -> None:
                found[stamp] = pictures.shown(frame)

            with opened(self._path) as (container, stream):
                Group(container, stream, self._index, stop, skips=False).decode(start, stamps, put)
            return found

        one, other = decoded(key), decoded(max(key - 1, 0))
        same = [stamp for stamp in one if stamp in other and np.array_equal(one[stamp], other[stamp])]
        for stamp in same:
            pictures.put_array(wanted[stamp], one[stamp])
        return [stamp for stamp in stamps if stamp not in same]

    def _walk(self, wanted: Mapping[int, int], pictures: Pictures, by_stamp: bool) -> None:
        """Decode from the start of the file. wanted: place in the result by time stamp (if `by_stamp`) or by number.

        Raises:
            WrongIndex: The file ends before all wanted frames were found.
            UserError: The file is damaged.
        """
        left, orientation = dict(wanted), self._index.facts.orientation
        several = self._index.clean and not by_stamp  # by_stamp: a frame failed, so the file is damaged
        with opened(self._path, _cores() if several else 1) as (container, stream):
            for count, frame in enumerate(frames_of(container, stream, self._path)):
                place = left.pop(frame.pts if by_stamp else count, None)
                orientation = Orientation.of(frame, self._path, orientation)
                if place is not None:
                    pictures.put(place, frame, orientation)
                if not left:
                    return
        raise WrongIndex


class Group:
    """Decodes groups of pictures (a key frame and the frames up to the next) of an open file."""

    def __init__(self, container: Any, stream: Any, index: FrameIndex, stop: Event, skips: bool = True) -> None:
        self._container, self._stream, self._entries, self._stop = container, stream, index.entries, stop
        self._codec = stream.codec_context
        # H.264 marks frames that no other refers to (nal_ref_idc = 0); HEVC only those that none of the same temporal
        # layer refers to. If a frame is missing, the decoder's replacement for it may depend on the skipped frames.
        self._skips = skips and index.facts.codec == "h264" and index.even

    def decode(self, key: int, wanted: Sequence[int], put: Callable[[int, Any], None]) -> list[int]:
        """Decode wanted frames of the group that starts at a key frame.

        Args:
            key: Index of the key frame among those of `Entries`, from 0.
            wanted: Time stamps of the wanted frames.
            put: Called with the time stamp and each decoded wanted frame, even if it is returned as failed later.

        Returns:
            The time stamps of the frames that failed: all wanted ones if FFmpeg reports an error, a frame is marked as
            corrupt, or the key frame does not come first, as in a gradual refresh; otherwise those not decoded.

        Raises:
            WrongIndex: A frame has a time stamp that no packet has, or is out of order.
        """
        import av

        left, first, started, last = set(wanted), self._entries.stamp[key], False, -(2**63)
        try:
            for frame in self._frames(key, wanted):
                if frame.pts not in self._entries.place_of or frame.pts < last:
                    raise WrongIndex
                last = frame.pts
                if not started and frame.pts < first:
                    continue  # a leading frame
                if frame.is_corrupt or not (started or frame.pts == first):
                    return list(wanted)
                started = True
                if frame.pts in left:
                    left.remove(frame.pts)
                    put(frame.pts, frame)
                if not left:
                    break
        except av.FFmpegError:
            return list(wanted)
        return list(left)

    def _frames(self, key: int, wanted: Sequence[int]) -> Iterator[Any]:
        """Decode from a key frame on; if `_skips`, without unwanted frames that no other refers to.

        Yields nothing if the container seeks to a later packet.
        """
        entries, started = self._entries, False
        self._container.seek(entries.seek[key], stream=self._stream, backward=True)
        for packet in self._container.demux(self._stream):
            if self._stop.is_set():
                return
            if not packet.size:
                continue
            if not started:
                place = entries.place_of.get(packet.pts, -1)
                if place > entries.place[key]:
                    return
                started = place == entries.place[key]
            if started:
                if self._skips:
                    self._codec.skip_frame = "DEFAULT" if packet.pts in wanted or packet.is_keyframe else "NONREF"
                yield from self._codec.decode(packet)
        yield from self._codec.decode(None)


class DecordReader:
    """Reads videos with decord 0.6, in a separate process, since decord may abort or hang."""

    name = "decord"

    def __init__(self, path: Path, index: FrameIndex | None, reason: str) -> None:
        """Open a file with decord. Without `index`, the frames that decord lists are not checked.

        Raises:
            DecordFailed: decord cannot open the file, or lists frames different from those of `index`.
            UserError: decord is not installed.
        """
        self._path, self.reason = path, reason
        if importlib.util.find_spec("decord") is None:
            raise UserError('reader "decord" is not installed: pip install decord, or try reader=auto')
        self._process = DecordProcess.shared()
        listed, self.fps = self._process.open(path)
        self.times = tuple(time - listed[0] for time in listed)
        if index is not None and (difference := _difference(self.times, index.times)):
            raise DecordFailed(difference)

    def decode(self, index: Sequence[int]) -> Tensor:
        pictures = Pictures(self._path, len(index))
        try:
            with closing(self._process.frames(self._path, index)) as frames:
                for place, picture in enumerate(frames):
                    pictures.put_array(place, picture)
        except DecordFailed as error:
            raise UserError(f"{self._path}: {error}: try reader=auto") from None
        return pictures.pixels


def _decord_alone(path: Path) -> DecordReader:
    """Open a file without PyAV. Raises UserError if it is truncated, or decord is missing, fails or gives bad times."""
    declared, size = declared_size(path), path.stat().st_size
    if declared > size:
        raise truncated(path, declared, size)
    try:
        reader = DecordReader(path, None, "PyAV is not installed")
    except DecordFailed as error:
        raise UserError(f"{path}: {error}: pip install av, which reads every format") from None
    if not all(before < after for before, after in pairwise(reader.times)):
        raise UserError(f"{path}: decord gives times that do not ascend: pip install av, which reads such files")
    return reader


def _difference(listed: Sequence[float], shown: Sequence[float]) -> str:
    """Describe how the frames that decord lists differ from those shown, in number or times; empty if they do not."""
    if len(listed) != len(shown):
        return f"decord lists {len(listed)} frames, {len(shown)} are shown"
    # The tolerance is for decord's times, which are float32.
    far = (place for place, (a, b) in enumerate(zip(listed, shown, strict=True)) if not abs(a - b) <= 1e-3 + 1e-6 * b)
    place = next(far, None)
    return "" if place is None else f"decord shows frame {place} at {listed[place]:.6g} s, it is shown at {shown[place]:.6g} s"


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
