"""Sample frames of a video file: choose them and read them. Decoding is in ``readers.py``."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice, did_you_mean
from specvlm.types import TokenGrid
from specvlm.video.av_file import WrongIndex
from specvlm.video.codec import Origin
from specvlm.video.container import check_file
from specvlm.video.readers import NAMES, Reader, open_reader

Found = TypeVar("Found")

MAX_FRAMES = 768  # Hugging Face's own limit for Qwen2.5-VL


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file, or of a section of it.

    Attributes:
        frames: Number of frames in the section.
        fps: Mean frames per second of the whole file.
        width: Width as shown, in pixels.
        height: Height as shown, in pixels.
        duration: Duration of the section in seconds, as frames / fps.
    """

    frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video, at their original size.

    Attributes:
        frames: (T, 3, H, W) uint8 RGB, on the CPU.
        times: Time of each frame in seconds, counted from the first frame of the file.
        fps: Sampled frames per second, (T / frames in the section) * source_fps, as Hugging Face's sampled_fps.
        source: The file, or another name of the video.
        total_frames: Number of frames in the whole file.
        source_fps: Mean frames per second of the whole file.
        index: Number of each frame in the file, counted in display order; empty if the frames do not come from a file.
        reader: Name of the reader and why it was chosen; empty if none was used.
    """

    frames: Tensor
    times: tuple[float, ...]
    fps: float
    source: str
    total_frames: int
    source_fps: float
    index: tuple[int, ...] = ()
    reader: str = ""

    @property
    def origin(self) -> Origin | None:
        """The file and the frame numbers, for the signals of `codec.py`; None if the frames do not come from a file."""
        return Origin(self.source, self.index) if self.index else None


class Processed(NamedTuple):
    """A clip after processing by a target's video processor (`VideoLM.processed`).

    Attributes:
        grid: Layout of its tokens.
        video: Inputs of the vision tower, with the `origin` and the `digest` of the pixels.
        frames: Number of frames that were read.
        source: The file, or another name of the video.
        reader: Name of the reader and why it was chosen; empty if none was used.
        nbytes: Bytes of the frames before they were processed.
    """

    grid: TokenGrid
    video: dict[str, Any]
    frames: int
    source: str
    reader: str
    nbytes: int


Sampling = Callable[[int, int], list[int]]
SAMPLINGS: dict[str, Sampling] = {  # rules that choose `count` of `total` frames
    # floor(i * total / count) exactly; Hugging Face's rule for LLaVA-OneVision (its 5.23 code; 5.17 rounds in float32)
    "uniform": lambda total, count: [place * total // count for place in range(count)],
    # Qwen2VLVideoProcessor.sample_frames: count rounded to an even number, then the same in float32
    "qwen": lambda total, count: torch.arange(0, total, total / count).int().tolist()[:count],
    # round(i * (total - 1) / (count - 1)), so the first and the last frame are included; the rule of qwen-vl-utils
    "endpoints": lambda total, count: torch.linspace(0, total - 1, count).round().long().tolist(),
}


def probe(source: str | Path | Clip, reader: str = "auto", *, start: float = 0.0, end: float | None = None) -> VideoInfo:
    """Describe a video file or a section of it. Indexes the file's frames and decodes the section's first frame.

    Args:
        source: A file, or a clip of all frames, which is described like a file of these frames.
        reader: "auto", "pyav" or "decord".
        start: Start of the section, in seconds.
        end: End of the section, in seconds, excluded; None for the end of the video.

    Returns:
        Frames and duration of the section; rate and size of the video.

    Raises:
        UserError: The video cannot be read (see ``read_video``), or the section is invalid or has no frames.
    """

    def describe(video: Reader | ClipReader) -> VideoInfo:
        window = _window(video.times, start, end, _name(source))
        height, width = video.decode([window[0]]).shape[2:]
        fps = _mean_fps(video)
        return VideoInfo(len(window), fps, width, height, len(window) / fps)

    return _with(source, reader, describe)


def read_video(
    source: str | Path | Clip,
    *,
    frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    reader: str = "auto",
    min_frames: int | None = None,
    max_frames: int = MAX_FRAMES,
    sampling: str | Sampling = "uniform",
) -> Clip:
    """Decode evenly spaced frames of a video file or of a section of it.

    The number of frames is set by ``frames`` or ``fps``; without either, every frame is taken. Even spacing counts
    frames, not seconds: if the frame rate varies, see ``times`` of the result.

    Args:
        source: A file, or a clip of all frames, which is read like a file of these frames.
        frames: Number of frames.
        fps: Frames per second. The clip has ``floor(seconds * fps)`` frames, but at least ``min_frames``, and at most
            ``max_frames`` and the number of frames in the section.
        start: Start of the section, in seconds.
        end: End of the section, in seconds, excluded; None for the end of the video.
        reader: "auto", "pyav" or "decord".
        min_frames: Minimum number of frames with ``fps``. None means 1, or 4 for "qwen".
        max_frames: Maximum number of frames. With ``fps``, no more are taken; otherwise asking for more is an error.
        sampling: The rule that spaces the frames: one of ``SAMPLINGS``, or a function of the number of frames in the
            section and the number wanted, which returns indices. "qwen" rounds the number to an even one, as Hugging
            Face does, if ``frames`` or ``fps`` is set.

    Returns:
        The frames, with their times and their places in the file.

    Raises:
        UserError: The file is missing, a folder, not a video, damaged, truncated, or has no frames; the reader is
            unknown, not installed or lacks the codec; the section has no frames; more frames are asked for than the
            section has (none is repeated), than ``max_frames`` or than fit in memory; or an argument is invalid.
    """
    _check(frames, fps, min_frames, max_frames, sampling)

    def sample(video: Reader | ClipReader) -> Clip:
        path = _name(source)
        total, source_fps = len(video.times), _mean_fps(video)
        window = _window(video.times, start, end, path)
        count = _count(len(window), source_fps, frames, fps, (min_frames, max_frames), sampling)
        if count > len(window):
            has = f"{path} has {len(window)} frames{_span(start, end)}"
            most = max(len(window) // 2 * 2, 1) if sampling == "qwen" else len(window)  # qwen takes an even number
            raise UserError(f"{has}, fewer than the {count} asked for: set frames={most} or less")
        if count > max_frames:
            raise UserError(f"{path}: {count} frames are more than max_frames={max_frames}: set frames=, fps= or max_frames=")
        rule = sampling if callable(sampling) else SAMPLINGS[sampling]
        index = [window[place] for place in rule(len(window), count)]
        pixels = video.decode(index)
        times = tuple(video.times[place] for place in index)
        places = () if isinstance(source, Clip) else tuple(index)
        read_by = f"{video.name}: {video.reason}" if video.name else ""
        return Clip(pixels, times, len(index) / len(window) * source_fps, path, total, source_fps, places, read_by)

    return _with(source, reader, sample)


def _check(frames: int | None, fps: float | None, min_frames: int | None, max_frames: int, sampling: Any) -> None:
    """Raise UserError for an invalid argument of `read_video`."""
    if not callable(sampling) and sampling not in SAMPLINGS:
        raise UserError(f'unknown sampling "{sampling}": one of {", ".join(SAMPLINGS)}.{did_you_mean(sampling, SAMPLINGS)}')
    if frames is not None and fps is not None:
        raise UserError(f"frames={frames} and fps={fps} cannot both be set: leave one out")
    for name, value in (("frames", frames), ("min_frames", min_frames), ("max_frames", max_frames)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{name}={value}: expected a whole number from 1")
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"fps={fps}: expected a number above 0")


class ClipReader:
    """Reads a clip in memory as if it were a file."""

    name = reason = ""

    def __init__(self, clip: Clip) -> None:
        self._frames, self.times, self.fps = clip.frames, clip.times, clip.source_fps

    def decode(self, index: Sequence[int]) -> Tensor:
        """Return copies of the frames with these numbers."""
        return self._frames[list(index)]


def _name(source: str | Path | Clip) -> str:
    return source.source if isinstance(source, Clip) else str(source)


def _with(source: str | Path | Clip, reader: str, use: Callable[[Reader | ClipReader], Found]) -> Found:
    """Open a video and call `use` with it. If its frame index turns out to be wrong, count the frames and try again."""
    for counted in (False, True):
        with suppress(WrongIndex):
            return use(_open(source, reader, counted))
    raise UserError(f"{_name(source)} is damaged: it gives different frames each time it is decoded")


def _open(source: str | Path | Clip, reader: str, counted: bool) -> Reader | ClipReader:
    """Open a video. Raises UserError if it cannot be read or has no frames."""
    check_choice("reader", reader, NAMES)
    if isinstance(source, Clip):
        video: Reader | ClipReader = ClipReader(source)
    else:
        check_file(Path(source))
        video = open_reader(Path(source), reader, counted)
    if not video.times:
        raise UserError(f"{_name(source)} holds no frames")
    return video


def _mean_fps(video: Reader | ClipReader) -> float:
    """Return the container's frame rate if it is within 1 % of the mean rate by the frames' times, else that mean.

    Containers state a wrong rate if it varies. A single frame has the container's rate, or 25 if it states none.
    """
    seconds = video.times[-1] - video.times[0]
    if seconds <= 0:
        return video.fps or 25.0
    measured = (len(video.times) - 1) / seconds
    return video.fps if abs(video.fps - measured) < 0.01 * measured else measured


def _window(times: tuple[float, ...], start: float, end: float | None, path: str | Path) -> range:
    """Return the numbers of the frames in a section. Raises UserError if it is invalid or has no frames."""
    if not 0 <= start < math.inf:
        raise UserError(f"start={start}: expected seconds from 0")
    if end is not None and not end > start:
        raise UserError(f"end={end}: expected seconds after start={start}")
    slack = 1e-3  # containers round times, and decord's are float32
    last = math.inf if end is None else end
    first = sum(time < start - slack for time in times)
    stop = sum(time < last - slack for time in times)
    if first >= stop:
        raise UserError(f"{path} has no frame{_span(start, end)}: its last one is at {times[-1]:.2f} s")
    return range(first, stop)


def _span(start: float, end: float | None) -> str:
    """Describe a section, for messages; empty for the whole video."""
    if not start and end is None:
        return ""
    return f" from {start} s" + ("" if end is None else f" to {end} s")


def _count(
    total: int, source_fps: float, frames: int | None, fps: float | None, bounds: tuple[int | None, int], sampling: Any
) -> int:
    """Return how many of `total` frames to sample (see the arguments of `read_video`).

    bounds: `min_frames` and `max_frames`.
    """
    if frames is not None:
        return max(2 * round(frames / 2), 1) if sampling == "qwen" else frames
    if fps is None:
        return total
    fewest, most = bounds
    wanted = total / source_fps * fps + 1e-6  # times are rounded: 59.9999999 frames mean 60
    if sampling == "qwen":
        even = min(total, most) // 2 * 2
        return max(math.floor(min(max(wanted, fewest or 4), even) / 2) * 2, 1)
    return min(max(int(wanted), fewest or 1), total, most)
