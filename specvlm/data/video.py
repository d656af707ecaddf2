"""Read a video file into a few frames."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class VideoInfo:
    frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class Clip:
    frames: Tensor  # uint8 (T, 3, H, W), CPU
    times: tuple[float, ...]  # seconds
    fps: float  # sampled frames per second
    source: str
    total_frames: int
    source_fps: float


def probe(path: str | Path, reader: str = "decord") -> VideoInfo:
    raise NotImplementedError


def read_video(path: str | Path, *, frames: int | None = None, fps: float | None = None, start: float = 0.0,
               end: float | None = None, reader: str = "decord", max_frames: int = 768) -> Clip:
    raise NotImplementedError
