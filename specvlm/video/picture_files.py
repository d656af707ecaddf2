"""Decode picture files, from disk or from memory: upright, RGB, with 8 bits per channel and a bounded size."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from specvlm.errors import UserError
from specvlm.parsing.files import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # decoders that are tried, regardless of the suffix; none runs a program
IMAGES = (*FORMATS, "TIFF")  # those for a caller's own images
MOST_PIXELS = 2**26  # limit for one picture, below the size at which Pillow warns


def read_picture(path: Path, formats: tuple[str, ...] = FORMATS) -> Tensor:
    """Read a picture, upright and with 8 bits per channel; of an animation, the first picture.

    The result equals that of transformers' ``load_image``, which applies the EXIF orientation and drops transparency,
    except for 16-bit grey: ``load_image`` clips its values at 255, while here the upper 8 bits are kept.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        UserError: There is no such file, it is not a picture or is damaged, or it has more than `MOST_PIXELS` pixels.
    """
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path} is not a file: expected a picture ({', '.join(formats)})")
    with _explained(str(path), formats), open_regular(path) as file:
        return _decoded(file, str(path), formats)


def picture_of_bytes(content: bytes, name: str) -> Tensor:
    """Decode the bytes of a picture file as `read_picture` does. name: What the messages call it."""
    with _explained(name, IMAGES):
        return _decoded(BytesIO(content), name, IMAGES)


def upright(image: Image.Image) -> Tensor:
    """Convert a picture of Pillow to (3, H, W) uint8 RGB, turned as its EXIF data says.

    Of 16-bit grey, the upper 8 bits are kept, as Pillow does for 16-bit colour.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        turned = Image.fromarray((np.asarray(turned).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1).contiguous()


def _decoded(file: IO[bytes], name: str, formats: tuple[str, ...]) -> Tensor:
    with Image.open(file, formats=formats) as image:
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{name} is {image.width}x{image.height}, more than {MOST_PIXELS} pixels: make it smaller")
        return upright(image)


@contextmanager
def _explained(name: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Turn what Pillow raises for a picture that cannot be decoded into UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of dropped transparency and broken EXIF data
            yield
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit
        raise UserError(f"{name} has more than {MOST_PIXELS} pixels: make it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is damaged or not a picture: expected {', '.join(formats)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        raise UserError(f"{name} is damaged or not a picture ({' '.join(str(error).split())})") from None
