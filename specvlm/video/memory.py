"""Make clips and images from data in memory: arrays, tensors, Pillow images, files as bytes."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from specvlm.errors import UserError
from specvlm.video.images import read_image
from specvlm.video.picture_files import picture_of_bytes, upright
from specvlm.video.video import Clip

UNKNOWN_FPS = 24.0  # the rate that Hugging Face assumes for frames of unknown rate
NAME = "frames in memory"


def clip_from_frames(frames: Any, fps: float = UNKNOWN_FPS) -> Clip:
    """Make a clip from frames in memory. All frames are used; none are left out by sampling.

    Args:
        frames: A uint8 array or tensor (T, H, W, 3) or (T, 3, H, W), or a sequence of pictures as `picture` takes them.
        fps: Frames per second.

    Raises:
        UserError: The frames have another type or shape, differ in size, or are empty; `fps` is not a number above 0.
    """
    if not (isinstance(fps, int | float) and fps > 0 and isfinite(fps)):
        raise UserError(f"fps={fps!r}: expected frames per second, a number above 0")
    if isinstance(frames, Tensor | np.ndarray):
        if frames.ndim != 4 or not len(frames):
            raise UserError(f"frames of shape {tuple(frames.shape)}: expected (T, H, W, 3) or (T, 3, H, W)")
    elif not isinstance(frames, Sequence) or isinstance(frames, str | bytes) or not frames:
        raise UserError(
            f"{type(frames).__name__} is not a video: expected a path, bytes, an array, a tensor or a list of frames"
        )
    pictures = [picture(frame) for frame in frames]
    if sizes := sorted({(one.shape[2], one.shape[1]) for one in pictures})[1:]:
        raise UserError(f"the frames differ in size: one is {sizes[0][0]}x{sizes[0][1]}")
    count = len(pictures)
    return Clip(torch.stack(pictures), tuple(place / fps for place in range(count)), float(fps), NAME, count, float(fps))


def picture(value: Any) -> Tensor:
    """Return a picture as (3, H, W) uint8 RGB.

    Args:
        value: A path, a file's bytes, a picture of Pillow, or a uint8 array or tensor (H, W, 3) or (3, H, W).

    Raises:
        UserError: The value is of another type, or cannot be read.
    """
    if isinstance(value, str | Path):
        return read_image(Path(value).expanduser())
    if isinstance(value, bytes | bytearray | memoryview):
        return picture_of_bytes(bytes(value), "an image given as bytes")
    if isinstance(value, Image.Image):
        return _channels_first(upright(value))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value)) if value.dtype == np.uint8 else value
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        kind = f"{getattr(value, 'dtype', '')} {type(value).__name__}".strip()
        raise UserError(f"{kind} is not a picture: expected a path, bytes, a picture of Pillow, or uint8 values")
    return _channels_first(value.cpu())


def _channels_first(pixels: Tensor) -> Tensor:
    """Convert (3, H, W) or (H, W, 3) to (3, H, W). Raises UserError for any other shape."""
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]) or 0 in pixels.shape:
        raise UserError(f"a picture of shape {tuple(pixels.shape)}: expected (H, W, 3) or (3, H, W)")
    return (pixels if pixels.shape[0] == 3 else pixels.permute(2, 0, 1)).contiguous()


class BytesFile:
    """Context manager that writes bytes to a temporary file and gives its path, for readers that take only files."""

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        self._content, self._folder = content, TemporaryDirectory(prefix="specvlm-")

    def __enter__(self) -> Path:
        path = Path(self._folder.name) / "video"
        path.write_bytes(self._content)
        return path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def detached(clip: Clip, name: str) -> Clip:
    """Return a copy of a clip read from a temporary file: with another name, and without an `origin`."""
    return replace(clip, source=name, index=())
