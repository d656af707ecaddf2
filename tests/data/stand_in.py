"""Stand in for torchvision, so that Hugging Face's processors run without it: `install()` before importing transformers.

It has only what they call, in terms of torch. `make_families.py` run with it writes what it wrote with torchvision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

NAMES = ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional")
NAMES += ("torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class InterpolationMode(Enum):
    """Names of ways to resize."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def resize(image: Tensor, size: Sequence[int], interpolation: Any = None, antialias: bool = True) -> Tensor:
    """Resize (..., C, H, W). An image of that size already stays as it is."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    flat = image.reshape(-1, *image.shape[-3:])
    made = nn.interpolate(flat, tuple(size), mode=interpolation.value, align_corners=False, antialias=antialias)
    return made.reshape(*image.shape[:-2], *size)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> Tensor:
    """Subtract the mean of each channel and divide by its std."""
    shift, scale = (torch.as_tensor(values, dtype=image.dtype)[:, None, None] for values in (mean, std))
    return (image - shift) / scale


def pad(image: Tensor, padding: Sequence[int], fill: float = 0, padding_mode: str = "constant") -> Tensor:
    """Pad at the left, top, right and bottom."""
    left, top, right, bottom = padding
    return nn.pad(image, (left, right, top, bottom), mode=padding_mode, value=fill)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Cut a rectangle out."""
    return image[..., top : top + height, left : left + width]


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """Return an image of three colours as it is."""
    assert image.shape[-3] == 3
    return image


def missing(*_: Any, **__: Any) -> Any:
    """Stand in for what no processor of these tests calls."""
    raise NotImplementedError


def install() -> None:
    """Register the modules."""
    made = {name: ModuleType(name) for name in NAMES}
    for name, module in made.items():
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.InterpolationMode = InterpolationMode
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
    made["torchvision"].__version__ = "0.28.0"
    functional = made["torchvision.transforms.v2.functional"]
    for function in (resize, normalize, pad, crop, grayscale_to_rgb):
        setattr(functional, function.__name__, function)
    for name in ("to_dtype", "pil_to_tensor"):
        setattr(functional, name, missing)
    made["torchvision.transforms.functional"].pil_to_tensor = missing
    sys.modules.update(made)
