"""Read the packets of a video stream without decoding, and decide whether their time stamps are those of its frames.

Shape suffixes: P packets in the order of storage, K key frames.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from specvlm.errors import UserError

# Containers whose time stamps are display times. Those of AVI are decoding times, which are the same without B-frames.
STAMPED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv")
WITHOUT_B_FRAMES = ("avi",)
# Codecs that show one frame per packet in these containers.
INTRA = ("mjpeg", "prores", "dnxhd", "ffvhuff", "huffyuv", "utvideo", "rawvideo", "v210", "png", "libopenjpeg", "jpeg2000")
INTER = ("h264", "hevc", "vp9", "av1", "libdav1d", "libaom-av1", "ffv1", "qtrle", "cinepak", "svq3", "cfhd", "magicyuv")
# Of mpeg4 and vp8, some packets show nothing: `_may_be_invisible` finds them.
ONE_TO_ONE = frozenset((*INTRA, *INTER, "mpeg4", "vp8"))
MPEG4_EMPTY = 32  # bytes: an MPEG-4 packet up to this size may repeat the last picture and show nothing
PROGRESSIVE = 1  # FFmpeg's code; 0 is unknown, above 1 are interlaced field orders
# Types of NAL units, the parts of an H.264 or HEVC packet.
PARAMETERS = {"h264": (7,), "hevc": (33,)}  # parameter sets, which contain the picture size
SPLICES = (16, 17, 18)  # HEVC key frames after which frames that refer to earlier ones are dropped
ENDS = (36, 37)  # HEVC end of sequence or stream, after which the next key frame has the same effect
# Key frames such that no frame that is stored and shown after one refers to a frame before it.
WHOLE = {"h264": (5,), "hevc": (16, 17, 18, 19, 20, 21)}
MOST = 5_000_000  # maximum number of packets: a day at 57 frames per second


@dataclass(frozen=True, eq=False)
class Entries:
    """The key frames of a file, where decoding can start, in the order of storage.

    Attributes:
        place: (K,) number of each key frame's packet, counted from 0 in the order of storage.
        stamp: (K,) display time of each key frame, in ticks (units of the stream's time base).
        seek: (K,) time stamp to pass to a seek to each key frame, in ticks.
        place_of: Number of each packet, by its display time.
    """

    place: tuple[int, ...] = ()
    stamp: tuple[int, ...] = ()
    seek: tuple[int, ...] = ()
    place_of: dict[int, int] = field(default_factory=dict)

    def before(self, stamp: int) -> int | None:
        """Find the key frame from which to decode a frame: the last that is stored and shown before it, or the frame.

        Args:
            stamp: Display time of the frame.

        Returns:
            Index k in 0..K-1; None if there is no such key frame. If `Packets.whole` is true, the frame refers to
            nothing before that key frame.
        """
        entry = bisect_right(self.place, self.place_of[stamp]) - 1
        while entry >= 0 and self.stamp[entry] > stamp:  # a leading frame may refer to frames before the key frame
            entry -= 1
        return entry if entry >= 0 else None


@dataclass(frozen=True, eq=False)
class Packets:
    """All P packets of a stream, in the order of storage.

    Attributes:
        kind: FFmpeg's name of the container.
        stamp: (P,) display time of each packet in ticks; None if the container does not state it.
        decoded: (P,) decoding time of each packet in ticks; None if the container does not state it.
        key: (P,) True for packets marked as key frames.
        hidden: (P,) True for packets that an edit list hides.
        size: (P,) bytes of each packet.
        corrupt: True if some packets are marked as damaged.
        invisible: True if some packets may show nothing.
        whole: False if H.264 or HEVC key frames are of other types than those in WHOLE.
        steady: False if H.264 or HEVC key frames carry different parameter sets, so that the picture size may change.
        spliced: True if the decoder may drop frames in the middle, or an edit list jumps back or hides packets there.
    """

    kind: str
    stamp: list[int | None] = field(default_factory=list)
    decoded: list[int | None] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    corrupt: bool = False
    invisible: bool = False
    whole: bool = True
    steady: bool = True
    spliced: bool = False

    @classmethod
    def read(cls, container: Any, stream: Any, file_size: int) -> Self:
        """Read all packets.

        Raises UserError if there are more packets than bytes in the file, as a damaged table claims, or than `MOST`.
        """
        codec, found = stream.codec_context, cls(container.format.name)
        corrupt = invisible = False
        whole = steady = True
        first, spliced, place = set[bytes](), False, 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            found._add(packet)
            if len(found.size) > min(file_size, MOST):
                raise UserError(f"{container.name} is damaged: it claims more frames than it has bytes")
            corrupt |= packet.is_corrupt
            invisible |= _may_be_invisible(codec.name, packet)
            spliced |= found.kind.startswith("mov") and (packet.pos or 0) < place
            place = packet.pos or 0
            spliced |= codec.name == "hevc" and any(kind in SPLICES or kind in ENDS for kind, _ in _units(packet, codec))
            if packet.is_keyframe and codec.name in WHOLE:
                units = list(_units(packet, codec))
                sets = {unit for kind, unit in units if kind in PARAMETERS[codec.name]}
                first = first or sets
                steady &= sets <= first
                whole &= any(kind in WHOLE[codec.name] for kind, _ in units)
        spliced |= found.hidden_between
        return replace(found, corrupt=corrupt, invisible=invisible, whole=whole, steady=steady, spliced=spliced)

    def _add(self, packet: Any) -> None:
        self.stamp.append(packet.pts)
        self.decoded.append(packet.dts)
        self.key.append(packet.is_keyframe)
        self.hidden.append(packet.is_discard)
        self.size.append(packet.size)

    def stamped(self, stream: Any) -> bool:
        """True if container, codec and packets leave no doubt that each packet shows one frame, at its time stamp.

        Packets that an edit list hides at the start or the end do not count.
        """
        codec = stream.codec_context
        container = self.kind in STAMPED or (self.kind in WITHOUT_B_FRAMES and not codec.has_b_frames)
        # A packet may be half a frame. PyAV before 16, which lmms-eval 0.7 pins, does not tell.
        halves = getattr(codec, "field_order", PROGRESSIVE + 1) > PROGRESSIVE
        told = bool(self.stamp) and None not in self.stamp and len(set(self.stamp)) == len(self.stamp)
        doubtful = self.corrupt or self.invisible or self.spliced or halves or codec.pix_fmt == "pal8"
        return container and codec.name in ONE_TO_ONE and told and not doubtful

    @property
    def hidden_between(self) -> bool:
        """True if an edit list hides packets between two that are shown."""
        pairs = [(stamp, hidden) for stamp, hidden in zip(self.stamp, self.hidden, strict=True) if stamp is not None]
        shown = [stamp for stamp, hidden in pairs if not hidden]
        first, last = min(shown, default=0), max(shown, default=0)
        return any(hidden and first < stamp < last for stamp, hidden in pairs)

    @property
    def open_gop(self) -> bool:
        """True if some frame is stored after a key frame, but shown before it (an open group of pictures)."""
        last = None
        for stamp, key in zip(self.stamp, self.key, strict=True):
            if key:
                last = stamp
            elif last is not None and stamp is not None and stamp < last:
                return True
        return False

    def entries(self) -> Entries:
        """List the key frames whose display time is stated."""
        keys = [place for place, key in enumerate(self.key) if key and self.stamp[place] is not None]
        by = self.decoded if self.kind.startswith("mov") else self.stamp  # as the container's own index does
        seek = [by[place] if by[place] is not None else self.stamp[place] for place in keys]
        places = {stamp: place for place, stamp in enumerate(self.stamp) if stamp is not None}
        return Entries(tuple(keys), tuple(self.stamp[place] or 0 for place in keys), tuple(at or 0 for at in seek), places)

    def incomplete(self, container: Any, stream: Any, file_size: int) -> bool:
        """True if a file that is shorter than it declares seems to lack frames.

        Compares the packets with the index of a MOV or MP4 file, the number of frames that an AVI file states, or else
        the duration that the container states.
        """
        if self.kind.startswith("mov") and hasattr(stream, "index_entries"):  # PyAV 16 and later
            return any(entry.pos + entry.size > file_size for entry in stream.index_entries)
        if self.kind == "avi":
            return len(self.size) < stream.frames
        stamps = sorted(stamp for stamp in self.stamp if stamp is not None)
        if len(stamps) < 2 or not container.duration:
            return True
        step = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
        there = float((stamps[-1] + 2 * step - (stream.start_time or 0)) * float(stream.time_base))
        return there < container.duration / 1e6


def _may_be_invisible(codec: str, packet: Any) -> bool:
    """Return True for a VP8 packet marked as not shown, and for an MPEG-4 packet so small that it may show nothing."""
    if codec == "vp8":
        return not bytes(packet)[0] >> 4 & 1  # show_frame, RFC 6386, 9.1
    return codec == "mpeg4" and packet.size <= MPEG4_EMPTY


def _units(packet: Any, codec: Any) -> Iterator[tuple[int, bytes]]:
    """Yield type and bytes of each NAL unit of an H.264 or HEVC packet.

    Reads units with length prefixes (ISO/IEC 14496-15) and with start codes (Annex B of the codecs' standards).
    """
    data, extra, hevc = bytes(packet), codec.extradata or b"", codec.name == "hevc"
    if extra[:1] == b"\1":  # a length precedes each unit; these bits give its width
        width = (extra[21] if hevc and len(extra) > 21 else extra[4] if len(extra) > 4 else 3) % 4 + 1
        units, place = [], 0
        while place + width < len(data):
            end = place + width + int.from_bytes(data[place : place + width], "big")
            units.append(data[place + width : end])
            place = end
    else:
        units = data.split(b"\0\0\1")[1:]
    for unit in units:
        if unit:
            yield unit[0] >> 1 & 63 if hevc else unit[0] & 31, unit.rstrip(b"\0")
