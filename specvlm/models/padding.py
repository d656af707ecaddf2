"""Pad the MLPs of a vision tower to widths that the fast matrix kernels of a GPU take.

cuBLAS reads rows of 16 bytes. Qwen2.5-VL-3B and 7B have vision MLPs of 3,420 columns, not a multiple of 8, so in 16
bits their products ran through an old kernel: the tower of the 7B took 584 ms for 16,384 video tokens on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specvlm.models.layer_kinds import language_model

READ = 8  # elements of 16 bits that are read at once: other widths are padded
TILE = 64  # to a multiple of this


def pad_tower(hf: Any) -> int:
    """Add columns of zeros to the vision tower's gated MLPs whose width is not a multiple of 8. Exact but for rounding.

    The added columns of the activation are activation(0) * 0 = 0, and the matching weights of the next layer are 0.

    hf: A Hugging Face model. Its parameters are replaced; their values stay.

    Returns:
        Number of MLPs that were padded.
    """
    found = list(_gated(hf))
    for module in found:
        width = module.down_proj.in_features
        more = -width % TILE
        for part in (module.gate_proj, module.up_proj):
            part.weight = _padded(part.weight, (0, 0, 0, more))
            part.bias = None if part.bias is None else _padded(part.bias, (0, more))
            part.out_features = width + more
        module.down_proj.weight = _padded(module.down_proj.weight, (0, more))
        module.down_proj.in_features = width + more
    return len(found)


def _gated(hf: Any) -> Iterator[Any]:
    """Yield the gated MLPs of plain linear layers outside the text model, which is not padded."""
    text = {id(module) for module in language_model(hf).modules()}
    for module in hf.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if id(module) in text or any(type(part) is not nn.Linear for part in parts):
            continue
        if module.down_proj.in_features % READ:
            yield module


def _padded(tensor: Tensor, by: tuple[int, ...]) -> nn.Parameter:
    """Make a parameter with zeros after a tensor's rows or columns (see `torch.nn.functional.pad`)."""
    return nn.Parameter(pad(tensor.detach(), by), requires_grad=tensor.requires_grad)


def pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to pad a model's tower and to fuse its modules: on a GPU in 16 bits. In float32 results stay Hugging Face's."""
    return device.type == "cuda" and dtype.itemsize == 2
