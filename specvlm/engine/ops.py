"""The steps of a lean forward in plain torch: what the kernels must agree with, and what runs where there are none.

Signatures and shapes are those of `kernels/`, whose docstring has the suffixes; `kind`, the storage of the weights that
a result will meet, matters there alone: here rows stay as they are, and stored weights are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense
from torch.nn.functional import silu

from specvlm.models.quantize import QuantizedLinear
from specvlm.parallel.ranks import ProcessGroup, local_shard


@dataclass(frozen=True)
class Weight:
    """A linear layer's own tensors, as the kernels read them. kind: "full" (in the rows' dtype), "fp8", "int8" or "int4".

    data (N, K), or (N, K/2) in 4 bits; scale (N,), or (N, K/group) in 4 bits, of no meaning when full.
    """

    layer: nn.Module
    data: Tensor
    scale: Tensor
    kind: str = "full"
    group: int = 0

    @classmethod
    def of(cls, layer: nn.Module) -> Weight:
        if isinstance(layer, QuantizedLinear):
            return cls(layer, layer.qweight, layer.scale, layer.kind, layer.group)
        assert isinstance(layer, nn.Linear)
        weight = local_shard(layer.weight)
        return cls(layer, weight, weight)

    @property
    def outputs(self) -> int:
        return self.data.shape[0]

    @property
    def inputs(self) -> int:
        return self.data.shape[1] * (2 if self.kind == "int4" else 1)

    def times(self, x_QK: Tensor) -> Tensor:
        """(Q, N), without the bias."""
        full = self.data if self.kind == "full" else self.layer.weight_in(x_QK.dtype)  # type: ignore[operator]
        return dense(x_QK, full)


def linear(x_QK: Tensor, weights: tuple[Weight, ...], whole: torch.dtype | None = None) -> Tensor:
    """(1, Q, N): x times one to three weights side by side."""
    return torch.cat([w.times(x_QK) for w in weights], -1)[None]


def gated(x_QK: Tensor, gate: Weight, up: Weight, dtype: torch.dtype, kind: str = "full") -> Tensor:
    return silu(gate.times(x_QK)) * up.times(x_QK)


def add_norm(x_QK: Tensor, parts_SQK: Tensor | None, weight_K: Tensor, eps: float, kind: str = "full") -> tuple[Tensor, Tensor]:
    total = x_QK if parts_SQK is None else x_QK + parts_SQK.sum(0).to(x_QK.dtype)
    wide = total.float()  # in float32 whatever the dtype, as Hugging Face has it
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight_K * scaled.to(total.dtype)


def all_reduce_add_norm(
    ranks: ProcessGroup, x_QK: Tensor, parts_SQK: Tensor, weight_K: Tensor, eps: float, kind: str = "full"
) -> tuple[Tensor, Tensor]:
    """`add_norm` of the parts of all ranks, each rank's rounded before they are added up, as by Hugging Face's modules."""
    return add_norm(x_QK, ranks.sum(whole(parts_SQK, torch.empty_like(x_QK)))[None], weight_K, eps, kind)


def whole(parts_SQN: Tensor, out_QN: Tensor) -> Tensor:
    """The sum of a linear layer's parts in `out`, rounded once, as this layer's module would give it."""
    return out_QN.copy_(parts_SQN.sum(0))


def rope(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor,
    keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, at: int, heads: int,
) -> Tensor:  # fmt: skip
    """(Q, H, D) rotated queries; keys and values go to the cache's slots base + at + row. cos and sin: (Q, D/2)."""
    kv_heads, _, width = keys_JCD.shape
    rows_QN = parts_SQN.sum(0)
    if biases:
        rows_QN = rows_QN + torch.cat(biases).to(rows_QN.dtype)
    rows_QHD = rows_QN.to(keys_JCD.dtype).unflatten(-1, (-1, width))
    turning, values = rows_QHD[:, : heads + kv_heads], rows_QHD[:, heads + kv_heads :]
    low, high = turning.chunk(2, -1)
    cos, sin = cos_QD[:, None], sin_QD[:, None]
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    slots = base + at + torch.arange(len(rows_QN), device=base.device)
    keys_JCD.index_copy_(1, slots, turned[:, heads:].transpose(0, 1))
    values_JCD.index_copy_(1, slots, values.transpose(0, 1))
    return turned[:, :heads]


def attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, seen_QT: Tensor, scale: float, kind: str = "full"
) -> Tensor:
    """(Q, H * D): each row over the first `base` slots and those of the next T that seen (int8) marks. The naive form:
    a mask over every slot of the cache, keys and values repeated for each query head.
    """
    heads = q_QHD.shape[1]
    kv_heads, capacity, _ = keys_JCD.shape
    slots_C = torch.arange(capacity, device=base.device)
    node_C = (slots_C - base).clamp(0, seen_QT.shape[1] - 1)
    tail_C = (slots_C >= base) & (slots_C < base + seen_QT.shape[1])
    seen_QC = (slots_C < base) | (tail_C & (seen_QT[:, node_C] != 0))
    wide = torch.promote_types(q_QHD.dtype, torch.float32)
    keys, values = (x.repeat_interleave(heads // kv_heads, 0).to(wide) for x in (keys_JCD, values_JCD))
    score_HQC = (q_QHD.transpose(0, 1).to(wide) @ keys.mT) * scale
    # What no row sees may hold anything, and zero times NaN is NaN.
    values = values.masked_fill(~seen_QC.any(0)[:, None], 0.0)
    weight_HQC = score_HQC.masked_fill(~seen_QC, float("-inf")).softmax(-1)
    return (weight_HQC @ values).transpose(0, 1).flatten(1).to(q_QHD.dtype)


def path_attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, depths_Q: Tensor, ways_QP: Tensor, scale: float,
    kind: str = "full",
) -> Tensor:  # fmt: skip
    """(Q, H * D): each row over the first `base` slots and those of the rows on its path, of which `ways` has the first
    `depth + 1`. The kernel of that name gives the bits of a pass of one row; here they are those of any other mask.
    """
    on_QP = torch.arange(ways_QP.shape[1], device=ways_QP.device) <= depths_Q[:, None]
    rows = len(q_QHD)
    seen_QT = torch.zeros(rows, rows + 1, dtype=torch.int8, device=ways_QP.device)
    seen_QT.scatter_(1, torch.where(on_QP, ways_QP, rows), 1)  # what stands behind a path's end goes to the column cut off
    return attention(q_QHD, keys_JCD, values_JCD, base, seen_QT[:, :rows], scale, kind)


def top(logits_QV: Tensor, count: int) -> Tensor:
    """(Q, count) int64: the tokens of the largest logits, largest first."""
    return logits_QV.topk(count).indices
