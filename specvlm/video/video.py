"""Read a video file into a few frames: which frames, at what times. Decoding itself is in ``readers.py``."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice, did_you_mean
from specvlm.video.av_file import WrongIndex
from specvlm.video.codec import Origin
from specvlm.video.container import check_file
from specvlm.video.readers import NAMES, Reader, open_reader

Found = TypeVar("Found")

MAX_FRAMES = 768  # Hugging Face's own limit for Qwen2.5-VL


@dataclass(frozen=True)
class VideoInfo:
    """What a file, or a part of it, holds: number of frames, mean frames per second, pixels as shown, seconds."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class Clip:
    """Frames sampled from a video, as decoded: nothing is resized."""

    frames: Tensor  # uint8 (T, 3, H, W), RGB, on the CPU
    times: tuple[float, ...]  # seconds of each frame after the first one of the file
    fps: float  # sampled frames per second: T / frames in the window * source_fps, as Hugging Face's sampled_fps
    source: str
    total_frames: int  # of the whole file
    source_fps: float  # mean over the file
    index: tuple[int, ...] = ()  # places of the frames in the file, as shown; empty where they come from none
    reader: str = ""  # what read the file, and why that; empty where nothing did

    @property
    def origin(self) -> Origin | None:
        return Origin(self.source, self.index) if self.index else None


SAMPLINGS: dict[str, Callable[[int, int], list[int]]] = {  # which of `total` frames are `count` evenly spaced ones
    # floor(i * total / count) exactly; Hugging Face's rule for LLaVA-OneVision (its 5.23 code; 5.17 rounds in float32)
    "uniform": lambda total, count: [place * total // count for place in range(count)],
    # Qwen2VLVideoProcessor.sample_frames: count rounded to an even number, then the same in float32
    "qwen": lambda total, count: torch.arange(0, total, total / count).int().tolist()[:count],
    # round(i * (total - 1) / (count - 1)), first and last frame included; the rule of qwen-vl-utils
    "endpoints": lambda total, count: torch.linspace(0, total - 1, count).round().long().tolist(),
}


def probe(source: str | Path | Clip, reader: str = "auto", *, start: float = 0.0, end: float | None = None) -> VideoInfo:
    """Describe a video file, or its part from ``start`` until before ``end`` (seconds): the frames and the duration are the
    part's. Reads the index and decodes the part's first frame. Also a clip of every frame there is.

    Raises UserError as ``read_video`` does.
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
    sampling: str = "uniform",
) -> Clip:
    """Decode evenly spaced frames of a video file, those shown from ``start`` until before ``end`` (seconds).

    A clip that holds every frame of its source is read as a file of these frames would be.

    ``frames=n`` takes n of them by the rule that ``sampling`` names (see ``SAMPLINGS``); ``fps=f`` takes
    ``floor(seconds * f)``, at least ``min_frames``, at most what there is and ``max_frames``; neither takes every frame.
    "qwen" makes the count even, and with ``fps`` at least 4 unless ``min_frames`` is given, as Hugging Face does. Even
    spacing counts frames, not seconds: where the frame rate varies, ``times`` tells when each frame is shown.

    Raises UserError: a missing file, a folder, no video, a damaged or truncated one, one without frames; a reader that is
    unknown, not installed or lacks the codec; a window without frames; more frames asked for than there are
    (as Hugging Face, nothing is repeated) or than ``max_frames``.
    """
    _check(frames, fps, min_frames, max_frames, sampling)

    def sample(video: Reader | ClipReader) -> Clip:
        path = _name(source)
        total, source_fps = len(video.times), _mean_fps(video)
        window = _window(video.times, start, end, path)
        count = _count(len(window), source_fps, frames, fps, (min_frames, max_frames), sampling)
        if count > len(window):
            has = f"{path} has {len(window)} frames{_span(start, end)}"
            raise UserError(f"{has}, fewer than the {count} asked for: set frames={len(window)} or less")
        if count > max_frames:
            raise UserError(f"{path}: {count} frames are more than max_frames={max_frames}: set frames=, fps= or max_frames=")
        index = [window[place] for place in SAMPLINGS[sampling](len(window), count)]
        pixels = video.decode(index)
        times = tuple(video.times[place] for place in index)
        places = () if isinstance(source, Clip) else tuple(index)
        read_by = f"{video.name}: {video.reason}" if video.name else ""
        return Clip(pixels, times, len(index) / len(window) * source_fps, path, total, source_fps, places, read_by)

    return _with(source, reader, sample)


def _check(frames: int | None, fps: float | None, min_frames: int | None, max_frames: int, sampling: str) -> None:
    if sampling not in SAMPLINGS:
        raise UserError(f'unknown sampling "{sampling}": one of {", ".join(SAMPLINGS)}.{did_you_mean(sampling, SAMPLINGS)}')
    if frames is not None and fps is not None:
        raise UserError(f"frames={frames} and fps={fps} exclude each other: set one")
    for name, value in (("frames", frames), ("min_frames", min_frames), ("max_frames", max_frames)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{name}={value}: wanted a whole number from 1")
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"fps={fps}: wanted a number above 0")


class ClipReader:
    """A clip in memory, as if it were a file."""

    name = reason = ""

    def __init__(self, clip: Clip) -> None:
        self._frames, self.times, self.fps = clip.frames, clip.times, clip.source_fps

    def decode(self, index: Sequence[int]) -> Tensor:
        return self._frames[list(index)]


def _name(source: str | Path | Clip) -> str:
    return source.source if isinstance(source, Clip) else str(source)


def _with(source: str | Path | Clip, reader: str, use: Callable[[Reader | ClipReader], Found]) -> Found:
    """Open a video and use it; count its frames and try again where the list of frames turns out to be wrong."""
    for counted in (False, True):
        with suppress(WrongIndex):
            return use(_open(source, reader, counted))
    raise UserError(f"{_name(source)} is damaged: it gives other frames each time it is decoded")


def _open(source: str | Path | Clip, reader: str, counted: bool) -> Reader | ClipReader:
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
    """Frames per second by the clock of the frames, since containers name a wrong rate where it varies."""
    seconds = video.times[-1] - video.times[0]
    if seconds <= 0:
        return video.fps or 25.0
    measured = (len(video.times) - 1) / seconds
    return video.fps if abs(video.fps - measured) < 0.01 * measured else measured


def _window(times: tuple[float, ...], start: float, end: float | None, path: str | Path) -> range:
    if not 0 <= start < math.inf:
        raise UserError(f"start={start}: wanted seconds from 0")
    if end is not None and not end > start:
        raise UserError(f"end={end}: wanted seconds after start={start}")
    slack = 1e-3  # times of containers are rounded, decord's are float32
    last = math.inf if end is None else end
    first = sum(time < start - slack for time in times)
    stop = sum(time < last - slack for time in times)
    if first >= stop:
        raise UserError(f"{path} has no frame{_span(start, end)}: its last one is at {times[-1]:.2f} s")
    return range(first, stop)


def _span(start: float, end: float | None) -> str:
    if not start and end is None:
        return ""
    return f" from {start} s" + ("" if end is None else f" to {end} s")


def _count(
    total: int, source_fps: float, frames: int | None, fps: float | None, bounds: tuple[int | None, int], sampling: str
) -> int:
    if frames is not None:
        return max(2 * round(frames / 2), 1) if sampling == "qwen" else frames
    if fps is None:
        return total
    fewest, most = bounds
    wanted = total / source_fps * fps + 1e-6  # times are rounded: 59.9999999 frames are 60
    if sampling == "qwen":
        even = min(total, most) // 2 * 2
        return max(math.floor(min(max(wanted, fewest or 4), even) / 2) * 2, 1)
    return min(max(int(wanted), fewest or 1), total, most)
