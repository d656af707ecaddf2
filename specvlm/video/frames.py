"""Read a folder of pictures as a clip: some data sets are distributed as frames, since they may not share videos."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from specvlm.errors import MissingVideo, UserError
from specvlm.parsing.files import open_regular
from specvlm.video.video import Clip

SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # decoders that are tried, regardless of the suffix
MOST_PIXELS = 2**26  # limit for one picture, below the size at which Pillow warns


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


def read_picture(path: Path) -> Tensor:
    """Read a picture, upright and with 8 bits per channel; of an animation, the first picture.

    The result equals that of transformers' ``load_image``, which applies the EXIF orientation and drops transparency,
    except for 16-bit grey: ``load_image`` clips its values at 255, while here the upper 8 bits are kept.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        UserError: There is no such file, it is not a picture or is damaged, or it has more than `MOST_PIXELS` pixels.
    """
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path} is not a file: expected a picture ({', '.join(SUFFIXES)})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of dropped transparency and broken EXIF data
            pixels = np.array(_upright(path))
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit
        raise UserError(f"{path} has more than {MOST_PIXELS} pixels: make it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is damaged or not a picture: expected {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        raise UserError(f"{path} is damaged or not a picture ({' '.join(str(error).split())})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(path: Path) -> Image.Image:
    """Open a picture as upright RGB. Of 16-bit grey, keep the upper eight bits, as Pillow does for 16-bit colour."""
    with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} is {image.width}x{image.height}, more than {MOST_PIXELS} pixels: make it smaller")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return upright.convert("RGB")
