"""Pad the MLPs of a vision tower to widths for which a GPU has fast matrix kernels.

cuBLAS's fast kernels read 16 bytes at a time, so in 16 bits the width of a row must be a multiple of 8. The vision MLPs
of Qwen2.5-VL-3B and 7B have 3,420 columns, not a multiple of 8. Without padding, cuBLAS takes an old kernel for them,
and the tower of the 7B takes 584 ms for 16,384 video tokens on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specvlm.models.layer_kinds import language_model

READ = 8  # elements of 16 bits that a kernel reads at a time: widths that are no multiple of it are padded
TILE = 64  # a padded width is a multiple of this


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
    """Whether padding a tower and fusing modules pays: on a GPU in 16 bits. Elsewhere results stay Hugging Face's."""
    return device.type == "cuda" and dtype.itemsize == 2
