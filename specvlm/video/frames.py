"""Read a folder of pictures as a clip: some data sets are distributed as frames, since they may not share videos."""

import math
import re
from pathlib import Path

import torch

from specvlm.errors import MissingVideo, UserError
from specvlm.video.picture_files import read_picture
from specvlm.video.video import Clip

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_frames(folder: str | Path, fps: float) -> Clip:
    """Read all pictures of a folder into memory, as a clip. Skips hidden files and files without one of SUFFIXES.

    Pictures are sorted by their names, in which numbers count as numbers: 2.jpg comes before 10.jpg.

    Args:
        folder: The folder.
        fps: Frames per second; the first frame is at 0 s.

    Raises:
        MissingVideo: There is no such folder.
        UserError: `folder` is a file or has no pictures, a picture cannot be read (see `read_picture`), pictures differ
            in size, or `fps` is not a finite number above 0.
    """
    folder = Path(folder)
    if not folder.exists():
        raise MissingVideo(f"no such folder of frames: {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of frames")
    if not 0 < fps < math.inf:
        raise UserError(f"{folder}: expected frames per second above 0, got fps={fps}")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise UserError(f"{folder} holds no frames: expected pictures ({', '.join(SUFFIXES)})")
    paths.sort(key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)])
    first = read_picture(paths[0])
    frames = torch.empty(len(paths), *first.shape, dtype=torch.uint8)
    for place, path in enumerate(paths):
        picture = read_picture(path)
        if picture.shape != first.shape:
            sizes = " and ".join(f"{shape[2]}x{shape[1]}" for shape in (first.shape, picture.shape))
            raise UserError(f"{folder}: its frames differ in size, {sizes} in {path.name}")
        frames[place] = picture
    times = tuple(place / fps for place in range(len(paths)))
    return Clip(frames, times, fps, str(folder), len(paths), fps)
