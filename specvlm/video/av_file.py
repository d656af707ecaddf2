"""Open a video file with PyAV: choose the stream, decode its frames, and find their orientation.

For files that are accepted here, the result is that of the `ffmpeg` command-line tool.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from specvlm.errors import UserError
from specvlm.parsing.files import open_regular

# Formats whose files name other files, URLs or devices to open. They are refused.
LISTS = frozenset(("hls", "applehttp", "concat", "dash", "imf", "webm_dash_manifest", "sdp", "rtsp", "rtp", "sap", "lavfi"))
# Decoders that may use frame threads. Others may not: with frame threads, FFmpeg's Theora decoder gives wrong pixels
# about 1 time in 40.
FRAME_THREADS = frozenset(("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1"))
# Formats that tolerate lost packets, or mix other data into the stream: see `frames_of`.
LOSSY = frozenset(("mpegts", "mpeg", "asf", "h264", "hevc", "m4v", "mpegvideo"))
DEFAULT_PIXELS = 5_000_000  # to choose a stream, the ffmpeg tool adds these to the picture size of one marked as default


class WrongIndex(Exception):
    """A file decodes to other frames than its `FrameIndex` lists. Callers then index it again, by counting frames."""


class Undecodable(Exception):
    """A packet cannot be decoded. The frames around it may then depend on the number of decoder threads."""


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is rotated and mirrored for display.

    Attributes:
        transposed: Swap rows and columns first.
        rows: Then reverse the order of the rows.
        columns: Then reverse the order of the columns.
    """

    transposed: bool = False
    rows: bool = False
    columns: bool = False

    def apply(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rotate and mirror a stored picture (H, W, …) for display. Returns a view."""
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        return picture[:: -1 if self.rows else 1, :: -1 if self.columns else 1]

    @classmethod
    def of(cls, frame: Any, path: Path, before: Self | None = None) -> Self:
        """Read the orientation of a decoded frame from its display matrix.

        Args:
            frame: A frame of PyAV.
            path: The file, for messages.
            before: Orientation to return if the frame has no display matrix. None means as stored.

        Raises:
            UserError: The angle is more than 1 degree from a multiple of 90.
        """
        kinds = _side_data_types()  # must come before any access to the frame's side data
        found = frame.side_data.get(kinds.DISPLAYMATRIX)
        if found is None:
            return before or cls()
        # x' = a x + c y and y' = b x + d y; y points down
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(found), np.int32)[:5])
        straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
        if min(straight, crossed) > math.tan(math.radians(1)) * max(straight, crossed):
            angle = round(math.degrees(math.atan2(b, a)))
            raise UserError(f"{path} is to be shown rotated by {angle} degrees; only multiples of 90 are supported")
        return cls(True, b < 0, c < 0) if crossed > straight else cls(False, d < 0, a < 0)


def container_of(path: Path) -> Any:
    """Open a file as a container of PyAV. FFmpeg may not open other files or URLs that it names."""
    import av

    may = {"format_whitelist": ",".join(sorted(av.formats_available - LISTS)), "protocol_whitelist": "file"}
    # An absolute path, since FFmpeg would take 12:30.mp4 for a URL.
    return av.open(os.path.abspath(path), metadata_errors="replace", options=may)


@contextmanager
def opened(path: Path, threads: int = 1, **options: str) -> Iterator[tuple[Any, Any]]:
    """Context manager that opens a video file.

    Args:
        path: A regular file.
        threads: Number of threads of the decoder. Decoders that are not in FRAME_THREADS get 1.
        options: FFmpeg options of the decoder.

    Yields:
        The container, and the video stream that the ffmpeg tool would use.

    Raises:
        UserError: The file cannot be read, has no video stream that can be decoded, or is an image or a text; or FFmpeg
            fails inside the `with` block.
    """
    import av

    try:
        with container_of(path) as container:
            stream = _shown(container, path)
            together = threads > 1 and stream.codec_context.name in FRAME_THREADS
            stream.codec_context.thread_count = threads if together else 1
            stream.thread_type = "AUTO" if together else "SLICE"
            stream.codec_context.options = options
            stream.codec_context.flags |= av.codec.context.Flags.unaligned  # crop exactly to the picture
            yield container, stream
    except (av.FFmpegError, IndexError) as error:  # IndexError: a stream that appeared while reading
        raise _unreadable(path, error) from None


def video_streams(container: Any) -> list[Any]:
    """List the video streams of a container, without cover pictures (which FFmpeg lists as video)."""
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def frames_of(container: Any, stream: Any, path: Path, strict: bool = False) -> Iterator[Any]:
    """Decode all frames from the container's current position, in display order.

    A packet that cannot be decoded is skipped if no key frame has been decoded yet, as in a stream that was cut, or if
    it is the last one. In the formats of LOSSY it is skipped anywhere.

    Args:
        container: From `opened`.
        stream: From `opened`.
        path: The file, for messages.
        strict: Raise Undecodable at the first packet that cannot be decoded.

    Raises:
        UserError: Without `strict`, a packet cannot be decoded and is not skipped.
        Undecodable: With `strict`, a packet cannot be decoded.
    """
    import av

    started, failed = False, None
    forgiving = container.format.name in LOSSY
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if failed is not None:
            raise UserError(f"{path} is damaged: PyAV cannot decode its frames{_at(failed)}")
        try:
            yield from stream.codec_context.decode(packet)
            started |= packet.is_keyframe
        except av.FFmpegError:
            if strict:
                raise Undecodable from None
            failed = packet if started and not forgiving else None
    try:
        yield from stream.codec_context.decode(None)
    except av.FFmpegError:  # the last packet, in a decoder with delay
        if strict:
            raise Undecodable from None


@lru_cache(maxsize=1)
def _side_data_types() -> Any:
    """Return PyAV's enum of side data types, changed to accept types that it does not list, such as EXIF.

    Without this change, any access to the side data of a frame with such a type raises ValueError.
    """
    from av.sidedata.sidedata import Type

    def unknown(cls: Any, value: int) -> Any:
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return member

    kinds: Any = Type
    kinds._missing_ = classmethod(unknown)
    return kinds


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a file that PyAV cannot read. The message is different for a list of other files."""
    with suppress(OSError, UserError), open_regular(path) as file:  # the file may be gone by now
        if file.read(16).lstrip(b"\xef\xbb\xbf").startswith((b"#EXTM3U", b"ffconcat")):
            return UserError(f"{path} is a list of other files, not a video")
    return UserError(f"{path} is damaged or not a video: PyAV cannot read it ({' '.join(str(error).split())[:120]})")


def _shown(container: Any, path: Path) -> Any:
    """Choose the stream as the ffmpeg tool does: the largest picture, with a bonus for a stream marked as default.

    Raises:
        UserError: The file has no video stream that can be decoded, or is an image or a text.
    """
    from av.stream import Disposition

    kind = container.format.name
    if kind.endswith("_pipe") or kind in ("image2", "tty"):
        raise UserError(f"{path} is {'a text' if kind == 'tty' else 'an image'}, not a video")
    streams = video_streams(container)
    if not streams:
        cover = " and a cover" if container.streams.video else ""
        raise UserError(f"{path} has {f'only sound{cover}' if container.streams.audio else 'no video stream'}")
    decoded = [stream for stream in streams if stream.codec_context is not None]
    if not decoded:
        raise UserError(f"{path} uses a video codec that this PyAV cannot decode")

    def preference(stream: Any) -> int:
        marked = bool(stream.disposition & Disposition.default)
        return stream.codec_context.width * stream.codec_context.height + DEFAULT_PIXELS * marked

    return max(decoded, key=preference)


def _at(packet: Any) -> str:
    """Say where a packet is in the file, for messages; empty if it has no time stamp."""
    return "" if packet.pts is None else f" at {float(packet.pts * packet.time_base):.2f} s"
