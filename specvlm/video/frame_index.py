"""Index the frames of a file in display order, with their times. Needs PyAV.

PyAV's reader and the codec signals use the index, and decord's list of frames is compared with it.

Not every packet is shown as a frame. Edit lists hide packets; if a file was cut where frames refer across a key frame,
some packets cannot be decoded; some containers have no time stamps, or derive them from the order of storage. So the
index is made from the packets' time stamps only if container and codec are known to show one frame per packet, and the
first decoded frames agree. Otherwise every frame is decoded and counted. FFmpeg's output is the reference: a frame that
it drops is not in the index.

Shape suffixes: N frames in display order.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from specvlm.errors import UserError
from specvlm.video.av_file import Orientation, Undecodable, frames_of, opened, video_streams
from specvlm.video.container import declared_size, truncated
from specvlm.video.packets import Entries, Packets

STEP = (1e-5, 86_400.0)  # lowest and highest plausible mean of the seconds between two frames
ANY_RATE = 25.0  # frames per second assumed for a file that states none
BROADCAST = ("mpegts", "mpeg")  # formats whose clock may jump
JUMP = (-0.1, 10.0)  # seconds from one frame to the next; outside this range the clock has jumped
NO_CLOCK = 128  # FFmpeg's flag of formats without time stamps


@dataclass(frozen=True)
class Facts:
    """Properties of a video stream.

    Attributes:
        kind: FFmpeg's name of the container.
        codec: FFmpeg's name of the decoder.
        pixels: FFmpeg's name of the pixel format; empty if unknown.
        fps: Frames per second that the container states; 0 if it states no plausible rate.
        base: Seconds per tick, the unit of time stamps; 0 if the format has no time stamps.
        streams: Number of video streams in the file, without cover pictures.
        orientation: Orientation of the first frame.
        width: Width of a frame as stored, in pixels.
        height: Height of a frame as stored, in pixels.
    """

    kind: str
    codec: str
    pixels: str
    fps: float
    base: float
    streams: int
    orientation: Orientation
    width: int
    height: int

    @classmethod
    def of(cls, container: Any, stream: Any, orientation: Orientation) -> Self:
        """Read the properties of an open stream, except the orientation, which is given."""
        codec, streams, fps = stream.codec_context, len(video_streams(container)), _rate(container, stream)
        made_up = container.format.flags & NO_CLOCK
        base = 0.0 if made_up else float(stream.time_base or 0)
        names = (container.format.name, codec.name, codec.pix_fmt or "")
        return cls(*names, fps, base, streams, orientation, codec.width, codec.height)

    def times(self, stamps: Sequence[int | None]) -> tuple[float, ...]:
        """Return the time of each frame, in seconds since the first.

        Times come from the time stamps (in ticks) if these ascend at a plausible rate, else from the frame rate.
        """
        found = [stamp * self.base for stamp in stamps if stamp is not None]
        if len(found) == len(stamps):
            found = self._without_jumps(found) if self.kind in BROADCAST else found
            times = tuple(time - found[0] for time in found)
            ascend = all(before <= after for before, after in pairwise(times))
            if len(times) == 1 or (ascend and STEP[0] <= times[-1] / (len(times) - 1) <= STEP[1]):
                return times
        return tuple(place / (self.fps or ANY_RATE) for place in range(len(stamps)))

    def _without_jumps(self, seconds: list[float]) -> list[float]:
        """Replace each jump of the clock by 1 / fps seconds, and shift the times after it."""
        out, shift = seconds[:1], 0.0
        for time in seconds[1:]:
            if not JUMP[0] <= time + shift - out[-1] <= JUMP[1]:
                shift = out[-1] + 1 / (self.fps or ANY_RATE) - time
            out.append(time + shift)
        return out


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """The frames of one video stream in display order.

    Attributes:
        times: (N,) Time of each frame, in seconds since the first.
        stamps: (N,) Time stamp of each frame in ticks, ascending. None if frames were counted instead.
        sizes: (N,) Compressed bytes of each frame; 0 if unknown.
        entries: The key frames, where decoding can start. Empty if frames were counted.
        packets: All packets of the stream.
        facts: Properties of the stream.
        clean: False if some packets turned out to be damaged: what FFmpeg decodes may then depend on the number of
            decoder threads.
    """

    times: tuple[float, ...]
    stamps: tuple[int, ...] | None
    sizes: tuple[int, ...]
    entries: Entries
    packets: Packets
    facts: Facts
    clean: bool = True

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def even(self) -> bool:
        """True if no frame seems to be missing: all steps between time stamps are below 1.9 times the median step.

        False without time stamps.
        """
        steps = sorted(after - before for before, after in pairwise(self.stamps or ()))
        return bool(steps) and steps[-1] < 1.9 * steps[len(steps) // 2]


def index_of(path: Path, counted: bool = False) -> FrameIndex:
    """Index the frames of a file. The last 16 indexes are cached, each until its file changes in size or date.

    Args:
        path: A regular file.
        counted: True if an index made from time stamps has turned out to be wrong: decode and count every frame, also
            in later calls for the same file.

    Raises:
        UserError: The file is damaged, not a video, or of a kind that cannot be read.
    """
    found = path.stat()
    file = (str(path), found.st_size, found.st_mtime_ns)
    if counted:
        _wrong.add(file)
    return _index(*file, file in _wrong)


# Files whose index from time stamps was wrong: path, size and time of modification.
_wrong: set[tuple[str, int, int]] = set()


@lru_cache(maxsize=16)
def _index(name: str, size: int, changed: int, counted: bool) -> FrameIndex:
    """Index a file for `index_of`. `changed`, its time of modification, is only part of the cache's key."""
    path = Path(name)
    declared = declared_size(path)
    try:
        with opened(path) as (container, stream):
            packets = Packets.read(container, stream, size)
            told = not counted and packets.stamped(stream)
            cut = declared > size and packets.incomplete(container, stream, size)
    except UserError:
        if declared > size:
            raise truncated(path, declared, size) from None
        raise
    if cut:
        raise truncated(path, declared, size)
    return (_by_stamps(path, packets) if told else None) or _by_counting(path, packets)


def _by_stamps(path: Path, packets: Packets) -> FrameIndex | None:
    """Make the index from the packets' time stamps, without the frames that FFmpeg drops at the start.

    Returns None if there is no key frame, or if the frames up to the first key frame decode to other time stamps.
    """
    listed = sorted(s for s, hidden in zip(packets.stamp, packets.hidden, strict=True) if s is not None and not hidden)
    first_key = next((stamp for stamp, key in zip(packets.stamp, packets.key, strict=True) if key), None)
    if first_key is None:
        return None
    shown: list[int] = []
    with opened(path) as (container, stream):
        for frame in frames_of(container, stream, path):
            if not shown:
                facts = Facts.of(container, stream, Orientation.of(frame, path))
            shown.append(-1 if frame.pts is None else frame.pts)
            if frame.pts is None or frame.pts >= first_key:  # FFmpeg drops frames only before the first key frame
                break
    if not shown or not set(shown) <= set(listed) or shown != sorted(shown):
        return None
    stamps = [*shown, *(stamp for stamp in listed if stamp > shown[-1])]
    sizes = dict(zip(packets.stamp, packets.size, strict=True))
    found = tuple(sizes[stamp] for stamp in stamps)
    return FrameIndex(facts.times(stamps), tuple(stamps), found, packets.entries(), packets, facts)


def _by_counting(path: Path, packets: Packets) -> FrameIndex:
    """Make the index by decoding the whole file: once, or twice if the first pass finds a damaged packet."""
    clean = not packets.corrupt
    try:
        stamps, facts = _count(path, (os.cpu_count() or 1) if clean else 1, strict=clean)
    except Undecodable:
        clean = False
        stamps, facts = _count(path, 1, strict=False)
    by_stamp = dict(zip(packets.stamp, packets.size, strict=True))
    in_order = dict(enumerate(packets.size))
    sizes = tuple(by_stamp[s] if s in by_stamp and s is not None else in_order.get(n, 0) for n, s in enumerate(stamps))
    return FrameIndex(facts.times(stamps), None, sizes, Entries(), packets, facts, clean)


def _count(path: Path, threads: int, strict: bool) -> tuple[list[int | None], Facts]:
    """Decode every frame. Returns the frames' time stamps in display order, and the properties of the stream.

    If the display times do not ascend but the decoding times do, the latter are returned as time stamps.

    Raises:
        UserError: No frame can be decoded, or the file is damaged.
        Undecodable: With `strict`, a packet cannot be decoded.
    """
    stamps: list[int | None] = []
    decoded: list[int | None] = []  # H.264 in AVI has decoding times instead of display times
    options = {"skip_loop_filter": "all"} | ({"err_detect": "explode"} if strict else {})
    with opened(path, threads, **options) as (container, stream):
        for frame in frames_of(container, stream, path, strict):
            if not stamps:
                facts = Facts.of(container, stream, Orientation.of(frame, path))
            stamps.append(frame.pts)
            decoded.append(frame.dts)
    if not stamps:
        raise UserError(f"{path} is damaged: none of its frames can be decoded")
    decoded = _continued(decoded)
    return (stamps if _ascend(stamps) or not _ascend(decoded) else decoded), facts


def _continued(stamps: list[int | None]) -> list[int | None]:
    """Extrapolate the decoding times that a decoder with delay does not give for the last frames, in even steps."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < 2 or stamps[: len(known)] != known:
        return stamps
    step = known[-1] - known[-2]
    return [*known, *(known[-1] + step * place for place in range(1, len(stamps) - len(known) + 1))]


def _ascend(stamps: Sequence[int | None]) -> bool:
    """Return True if no time stamp is missing and they strictly ascend."""
    found = [stamp for stamp in stamps if stamp is not None]
    return len(found) == len(stamps) and all(before < after for before, after in pairwise(found))


def _rate(container: Any, stream: Any) -> float:
    """Return the frames per second that the container states, or that FFmpeg guesses; 0 if neither is plausible."""
    # Without a clock, average_rate is a constant.
    guessed = (stream.guessed_rate,) if container.format.flags & NO_CLOCK else ()
    for rate in (*guessed, stream.average_rate, stream.guessed_rate):
        if rate and 1 / STEP[1] <= rate <= 1 / STEP[0]:
            return float(rate)
    return 0.0
