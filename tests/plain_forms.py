"""The operations of `specvlm.models.fused_kernels` in plain torch, as Hugging Face's modules compute them, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return weight_K * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(x: Tensor, added: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x + added, norm(x + added, weight_K, eps)


def gate(gate_QK: Tensor, up_QK: Tensor) -> Tensor:
    return gate_QK.copy_(torch.nn.functional.silu(gate_QK) * up_QK)


def turn(
    q_QHD: Tensor, k_QJD: Tensor, cos_QD: Tensor, sin_QD: Tensor, rounded: bool, norms: Sequence[Tensor] = (), eps: float = 0.0
) -> None:
    for number, x in enumerate((q_QHD, k_QJD)):
        y = norm(x, norms[number], eps) if norms else x
        y, cos, sin = (part if rounded else part.float() for part in (y, cos_QD[:, None], sin_QD[:, None]))
        low, high = y.chunk(2, -1)
        x.copy_((y * cos + torch.cat([-high, low], -1) * sin).to(x.dtype))
