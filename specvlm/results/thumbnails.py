"""Encode small pictures of frames and sets of kept tokens for HTML pages."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

SIDE = 384  # most pixels on the longer side of a picture


def picture(frame: torch.Tensor) -> Image.Image:
    """Shrink a frame, uint8 (3, height, width), to a picture of at most SIDE pixels per side."""
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    return image


def data_uri(image: Image.Image) -> str:
    """Encode a picture as a WebP data URI."""
    file = io.BytesIO()
    image.save(file, "webp", quality=70)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def bits(kept: Sequence[int], total: int) -> str:
    """Encode the indices of kept tokens as base64: one bit for each of `total` tokens, most significant bit first."""
    mask = np.zeros(total, dtype=np.uint8)
    mask[list(kept)] = 1
    return base64.b64encode(np.packbits(mask).tobytes()).decode()
