"""A folder of pictures as a clip: the form in which videos are shared that may not be shared themselves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from specvlm.data.video import Clip
from specvlm.errors import MissingVideo, UserError

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_frames(folder: str | Path, fps: float) -> Clip:
    """Every picture of a folder as a clip, `fps` of them a second, the first one at 0 s; all are held in memory.

    They follow one another by the numbers in their names: 2.jpg stands before 10.jpg. Raises MissingVideo where there is no
    such folder; UserError where it holds no picture, a damaged one, or one of another size than the first.
    """
    folder = Path(folder)
    if not folder.exists():
        raise MissingVideo(f"no such folder of frames: {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of frames")
    if not fps > 0:
        raise UserError(f"{folder}: wanted frames a second above 0, got fps={fps}")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise UserError(f"{folder} holds no frames: wanted pictures ({', '.join(SUFFIXES)})")
    paths.sort(key=lambda path: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)])
    first = _picture(paths[0])
    frames = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
    for place, path in enumerate(paths):
        picture = _picture(path)
        if picture.shape != first.shape:
            sizes = " and ".join(f"{shape[2]}x{shape[1]}" for shape in (first.shape, picture.shape))
            raise UserError(f"{folder}: its frames differ in size, {sizes} in {path.name}")
        frames[place] = picture
    times = tuple(place / fps for place in range(len(paths)))
    return Clip(frames, times, fps, str(folder), len(paths), fps)


def _picture(path: Path) -> Tensor:
    """uint8 (3, H, W)."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # SyntaxError: what PIL raises for a broken PNG
        raise UserError(f"{path} is damaged or not a picture ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
