"""Which frames of a file are shown, in what order and when: the one list that all readers and the codec signals share.

A file stores packets, and a packet is not always a frame on the screen. Edit lists hide packets, a cut in an open group of
pictures leaves some that cannot be decoded, some containers lack time stamps or take them from the order of storage. So the
list comes from the packets' time stamps alone only where container and codec are known to have a frame for each; everywhere
else every frame is decoded once and counted. FFmpeg's own output is the standard: what it drops is not on the list.

Shape suffixes: P packets in the order of storage, N frames in the order of showing, K key frames.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from specvlm.errors import UserError

# Containers whose time stamps say when a frame is shown. AVI's say when it is decoded, which is the same without B-frames.
STAMPED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv")
WITHOUT_B_FRAMES = ("avi",)
# Codecs that show a frame for each packet, in these containers.
INTRA = ("mjpeg", "prores", "dnxhd", "ffvhuff", "huffyuv", "utvideo", "rawvideo", "v210", "png", "libopenjpeg", "jpeg2000")
INTER = ("h264", "hevc", "vp9", "av1", "libdav1d", "libaom-av1", "ffv1", "qtrle", "cinepak", "svq3", "cfhd", "magicyuv")
ONE_TO_ONE = frozenset((*INTRA, *INTER, "mpeg4", "vp8"))  # the last two but for what `_may_be_invisible` finds
# Decoders that may work on several frames at once. FFmpeg's Theora decoder sometimes gives other pixels then: 1 in 40 times.
FRAME_THREADS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "mpeg4"))
MPEG4_EMPTY = 32  # bytes: a packet of MPEG-4 no longer than this may be one that shows nothing
# Formats that name other files, or addresses, to be opened.
LISTS = frozenset(("hls", "applehttp", "concat", "dash", "imf", "webm_dash_manifest", "sdp", "rtsp", "rtp", "sap", "lavfi"))
STEP = (1e-5, 86_400.0)  # seconds between two frames, on average: shorter or longer ones are no times of a video
ANY_RATE = 25.0  # frames a second, where a file names none


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """The frames of one video stream as they are shown.

    Attributes:
        times: seconds of each frame after the first (N).
        stamps: time stamp of each frame, ascending (N); None where frames can only be counted from the start.
        sizes: compressed bytes of each frame (N).
        entries: where decoding can start.
        open_gop: whether frames that are stored behind a key frame are shown before it.
        facts: what else is known of the stream.
    """

    times: tuple[float, ...]
    stamps: tuple[int, ...] | None
    sizes: tuple[int, ...]
    entries: Entries
    open_gop: bool
    facts: Facts

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class Facts:
    """Of a video stream.

    Attributes:
        fps: the rate that the container names; 0 where it names none.
        base: seconds of one tick of its time stamps.
        codec: FFmpeg's name of the decoder.
        streams: how many video streams the file has, covers not counted.
        orientation: how the first frame is turned for showing.
        width, height: pixels of a frame as stored.
    """

    fps: float
    base: float
    codec: str
    streams: int
    orientation: Orientation
    width: int
    height: int

    @classmethod
    def of(cls, container: Any, stream: Any, orientation: Orientation) -> Facts:
        codec, base = stream.codec_context, float(stream.time_base or 0)
        return cls(_rate(stream), base, codec.name, len(_videos(container)), orientation, codec.width, codec.height)

    def times(self, stamps: Sequence[int | None]) -> tuple[float, ...]:
        """Seconds after the first frame: by its time stamps where they ascend and are plausible, else by the rate."""
        found = [stamp for stamp in stamps if stamp is not None]
        if len(found) == len(stamps) and all(before < after for before, after in pairwise(found)):
            times = tuple((stamp - found[0]) * self.base for stamp in found)
            if len(times) == 1 or STEP[0] <= times[-1] / (len(times) - 1) <= STEP[1]:
                return times
        return tuple(place / (self.fps or ANY_RATE) for place in range(len(stamps)))


@dataclass(frozen=True, eq=False)
class Entries:
    """The key frames of a file (K): their place among the packets, time stamp, and what to seek by."""

    place: tuple[int, ...] = ()
    stamp: tuple[int, ...] = ()
    seek: tuple[int, ...] = ()
    place_of: dict[int, int] = field(default_factory=dict)  # time stamp of every packet -> its place (P)

    def before(self, stamp: int) -> int | None:
        """The last key frame that is stored before a frame, and shown before it: all it refers to lies behind.

        Returns its place in this list; None where there is none.
        """
        entry = bisect_right(self.place, self.place_of[stamp]) - 1
        while entry >= 0 and self.stamp[entry] > stamp:  # a leading frame refers to what was before the key frame
            entry -= 1
        return entry if entry >= 0 else None


@dataclass(frozen=True)
class Orientation:
    """How a picture is turned for showing: transposed first, then its rows and columns reversed."""

    transposed: bool = False
    rows: bool = False
    columns: bool = False

    @property
    def mirrored(self) -> bool:
        return self.transposed ^ self.rows ^ self.columns

    def apply(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(H, W, …) as stored to (H, W, …) as shown; a view."""
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        return picture[:: -1 if self.rows else 1, :: -1 if self.columns else 1]

    @classmethod
    def of(cls, frame: Any, path: Path, before: Orientation | None = None) -> Orientation:
        """Of a decoded frame, from its display matrix; a frame without one is turned as those before it.

        Raises UserError for an angle that is no multiple of 90 degrees.
        """
        from av.sidedata.sidedata import Type

        found = frame.side_data.get(Type.DISPLAYMATRIX)
        if found is None:
            return before or cls()
        # x' = a x + c y and y' = b x + d y; y points down
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(found), np.int32)[:5])
        straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
        if min(straight, crossed) > math.tan(math.radians(1)) * max(straight, crossed):
            angle = round(math.degrees(math.atan2(b, a)))
            raise UserError(f"{path} is to be shown rotated by {angle} degrees; only multiples of 90 are supported")
        return cls(True, b < 0, c < 0) if crossed > straight else cls(False, d < 0, a < 0)


def index_of(path: Path, counted: bool = False) -> FrameIndex:
    """The frames of a file; kept for files that were asked for before and have not changed since.

    Args:
        path: a regular file.
        counted: decode every frame, since the list made of time stamps has turned out to be wrong.

    Raises:
        UserError: PyAV is not installed, or the file is damaged, no video, or of a kind that cannot be read.
    """
    found = path.stat()
    return _index(str(path), found.st_size, found.st_mtime_ns, counted)


@lru_cache(maxsize=16)
def _index(path: str, size: int, changed: int, counted: bool) -> FrameIndex:
    with opened(Path(path)) as (container, stream):
        packets = Packets.read(container, stream, size)
        counted = counted or not packets.stamped(container, stream)
    if not counted and (index := _by_stamps(Path(path), packets)):
        return index
    return _by_counting(Path(path), packets)


@contextmanager
def opened(path: Path, threads: int = 1, **options: str) -> Iterator[tuple[Any, Any]]:
    """Open a file with PyAV: its container, and the stream that FFmpeg would show.

    Args:
        path: a regular file.
        threads: of the decoder.
        options: FFmpeg's options of the decoder.

    Raises:
        UserError: see `index_of`; also for what FFmpeg raises while it is open.
    """
    import av

    try:
        # An absolute path, since FFmpeg takes 12:30.mp4 for an address. It may open no other file and no address.
        may = {"format_whitelist": ",".join(sorted(_formats())), "protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), metadata_errors="replace", options=may) as container:
            stream = _shown(container, path)
            together = threads > 1 and stream.codec_context.name in FRAME_THREADS
            stream.codec_context.thread_count = threads if together else 1
            stream.thread_type = "AUTO" if together else "SLICE"
            stream.codec_context.options = options
            yield container, stream
    except av.FFmpegError as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=1)
def _formats() -> frozenset[str]:
    import av

    return frozenset(av.formats_available) - LISTS


def _unreadable(path: Path, error: Exception) -> UserError:
    with path.open("rb") as file:
        if file.read(16).lstrip(b"\xef\xbb\xbf").startswith((b"#EXTM3U", b"ffconcat")):
            return UserError(f"{path} is a list of other files, not a video")
    return UserError(f"{path} is damaged or not a video: PyAV cannot read it ({' '.join(str(error).split())[:120]})")


def _shown(container: Any, path: Path) -> Any:
    """The stream that the ffmpeg tool takes: the largest picture, one marked as default before others. No covers."""
    kind = container.format.name
    if kind.endswith("_pipe") or kind in ("image2", "tty"):
        raise UserError(f"{path} is {'a text' if kind == 'tty' else 'an image'}, not a video")
    streams = _videos(container)
    if not streams:
        sound = (
            f"only sound{' and a cover' if container.streams.video else ''}" if container.streams.audio else "no video stream"
        )
        raise UserError(f"{path} has {sound}")
    stream = max(streams, key=_preference)
    if stream.codec_context is None:
        raise UserError(f"{path} uses a video codec that this PyAV cannot decode")
    return stream


def _videos(container: Any) -> list[Any]:
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _preference(stream: Any) -> int:
    from av.stream import Disposition

    codec, marked = stream.codec_context, bool(stream.disposition & Disposition.default)
    return 0 if codec is None else codec.width * codec.height + 5_000_000 * marked


@dataclass(frozen=True, eq=False)
class Packets:
    """All packets of a stream, in the order of storage (P)."""

    stamp: list[int | None]  # when it is shown
    decoded: list[int | None]  # when it is decoded
    key: list[bool]
    hidden: list[bool]
    corrupt: bool
    size: list[int]
    invisible: bool  # there are some that show nothing, or may
    kind: str  # of the container

    @classmethod
    def read(cls, container: Any, stream: Any, file_size: int) -> Packets:
        """Raises UserError for more packets than bytes, which a damaged table may promise."""
        codec, kind = stream.codec_context.name, container.format.name
        found = cls([], [], [], [], False, [], False, kind)
        corrupt = invisible = False
        for packet in container.demux(stream):
            if not packet.size:
                continue
            found.stamp.append(packet.pts)
            found.decoded.append(packet.dts)
            found.key.append(packet.is_keyframe)
            found.hidden.append(packet.is_discard)
            found.size.append(packet.size)
            corrupt |= packet.is_corrupt
            invisible |= _may_be_invisible(codec, packet)
            if len(found.size) > file_size:
                raise UserError(f"{container.name} is damaged: it promises more frames than it has bytes")
        return cls(found.stamp, found.decoded, found.key, found.hidden, corrupt, found.size, invisible, kind)

    def stamped(self, container: Any, stream: Any) -> bool:
        """Whether there is one frame for each packet that is not hidden, at the packet's own time."""
        codec = stream.codec_context
        reordered = bool(codec.has_b_frames)
        container_is = self.kind in STAMPED or (self.kind in WITHOUT_B_FRAMES and not reordered)
        codec_is = codec.name in ONE_TO_ONE or codec.name in ("mpeg4", "vp8")
        fields = str(codec.field_order or "").lower() in ("tt", "bb", "tb", "bt")  # a packet may be half a frame
        stamps = [stamp for stamp, hidden in zip(self.stamp, self.hidden, strict=True) if not hidden]
        whole = None not in self.stamp and len(set(self.stamp)) == len(self.stamp)
        return bool(stamps) and container_is and codec_is and whole and not (self.corrupt or self.invisible or fields)

    @property
    def open_gop(self) -> bool:
        """Whether a frame stored behind a key frame is shown before it."""
        last = None
        for stamp, key in zip(self.stamp, self.key, strict=True):
            if stamp is None:
                continue
            if key:
                last = stamp
            elif last is not None and stamp < last:
                return True
        return False

    def entries(self) -> Entries:
        keys = [place for place, key in enumerate(self.key) if key and self.stamp[place] is not None]
        by = self.decoded if self.kind.startswith("mov") else self.stamp  # what the container's own index is in
        seek = [by[place] if by[place] is not None else self.stamp[place] for place in keys]
        places = {stamp: place for place, stamp in enumerate(self.stamp) if stamp is not None}
        return Entries(tuple(keys), tuple(self.stamp[place] or 0 for place in keys), tuple(at or 0 for at in seek), places)


def _may_be_invisible(codec: str, packet: Any) -> bool:
    if codec == "vp8":
        return not bytes(packet)[0] >> 4 & 1  # show_frame, RFC 6386, 9.1
    return codec == "mpeg4" and packet.size <= MPEG4_EMPTY


def _by_stamps(path: Path, packets: Packets) -> FrameIndex | None:
    """The list of the packets' time stamps, less what FFmpeg drops at the start. None where they don't tell."""
    stamps = sorted(s for s, hidden in zip(packets.stamp, packets.hidden, strict=True) if s is not None and not hidden)
    first_key = next((stamp for stamp, key in zip(packets.stamp, packets.key, strict=True) if key), None)
    if first_key is None:
        return None
    shown: list[int | None] = []
    with opened(path) as (container, stream):
        for frame in frames_of(container, stream, path):
            if not shown:
                orientation = Orientation.of(frame, path)
            shown.append(frame.pts)
            if frame.pts is None or frame.pts >= first_key:  # only before the first key frame anything is dropped
                break
        facts = Facts.of(container, stream, orientation) if shown else None
    there = set(stamps)
    if facts is None or any(stamp not in there for stamp in shown) or shown != sorted(shown):
        return None
    stamps = sorted({*shown, *(stamp for stamp in stamps if stamp > shown[-1])})
    sizes = dict(zip(packets.stamp, packets.size, strict=True))
    found = tuple(sizes[stamp] for stamp in stamps)
    return FrameIndex(facts.times(stamps), tuple(stamps), found, packets.entries(), packets.open_gop, facts)


def _by_counting(path: Path, packets: Packets) -> FrameIndex:
    """The list of all frames that are decoded. Costs as much as decoding the file, without the filters that smooth edges."""
    stamps: list[int | None] = []
    with opened(path, os.cpu_count() or 1, skip_loop_filter="all") as (container, stream):
        for frame in frames_of(container, stream, path):
            if not stamps:
                orientation = Orientation.of(frame, path)
            stamps.append(frame.pts)
        facts = Facts.of(container, stream, orientation) if stamps else None
    if facts is None:
        raise UserError(f"{path} is damaged: none of its frames can be decoded")
    by_stamp = dict(zip(packets.stamp, packets.size, strict=True))
    in_order = dict(enumerate(packets.size))
    sizes = tuple(by_stamp[s] if s in by_stamp and s is not None else in_order.get(n, 0) for n, s in enumerate(stamps))
    return FrameIndex(facts.times(stamps), None, sizes, Entries(), packets.open_gop, facts)


def frames_of(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """All frames from where the container stands, as FFmpeg shows them.

    What comes before the first key frame is passed over, as in a stream that was cut, and so is an incomplete last packet.
    Raises UserError for what cannot be decoded in between.
    """
    import av

    started, failed = False, None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if failed is not None:
            raise UserError(f"{path} is damaged: PyAV cannot decode its frames{_at(failed)}")
        try:
            yield from stream.codec_context.decode(packet)
            started |= packet.is_keyframe
        except av.FFmpegError:
            failed = packet if started else None
    yield from stream.codec_context.decode(None)


def _at(packet: Any) -> str:
    return "" if packet.pts is None else f" at {float(packet.pts * packet.time_base):.2f} s"


def _rate(stream: Any) -> float:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 1 / STEP[1] <= rate <= 1 / STEP[0]:
            return float(rate)
    return 0.0
