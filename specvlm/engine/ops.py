"""Operations of the lean pass in plain torch: the reference for the kernels, and the fallback without them.

Signatures and shapes are those of `kernels/`; its docstring lists the shape suffixes. `kind` is the storage type of the
weights that the result will be multiplied with (see `Weight`). Only the kernels use `kind`, to quantise their results;
here rows keep their dtype, and quantised weights are dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense
from torch.nn.functional import silu

from specvlm.models.quantize import QuantizedExperts, QuantizedLinear
from specvlm.parallel.ranks import ProcessGroup, local_shard


@dataclass(frozen=True)
class Weight:
    """Tensors of a linear layer, as the kernels read them.

    Attributes:
        layer: The layer.
        data: (N, K) weights; (N, K/2) for int4, two to a byte.
        scale: (N,) float32 scales; (N, K/group) for int4; unused for "full".
        kind: "full" (same dtype as the rows), "fp8", "int8" or "int4".
        group: Number of inputs that share a scale; 0 for "full".
    """

    layer: nn.Module
    data: Tensor
    scale: Tensor
    kind: str = "full"
    group: int = 0

    @classmethod
    def of(cls, layer: nn.Module) -> Weight:
        """Wrap a dense or quantised layer; with tensor parallelism, this rank's shard of it."""
        if isinstance(layer, QuantizedLinear):
            return cls(layer, layer.qweight, layer.scale, layer.kind, layer.group)
        assert isinstance(layer, nn.Linear)
        weight = local_shard(layer.weight)
        return cls(layer, weight, weight)

    @property
    def outputs(self) -> int:
        """Number of outputs N."""
        return self.data.shape[0]

    @property
    def inputs(self) -> int:
        """Number of inputs K."""
        return self.data.shape[1] * (2 if self.kind == "int4" else 1)

    def times(self, x_QK: Tensor) -> Tensor:
        """Compute (Q, N) outputs, without the bias."""
        return dense(x_QK, self.full_in(x_QK.dtype))

    def full_in(self, dtype: torch.dtype) -> Tensor:
        """(N, K) weights, dequantised to a dtype if they are quantised."""
        return self.data if self.kind == "full" else self.layer.weight_in(dtype)  # type: ignore[operator]


@dataclass(frozen=True)
class Experts:
    """Tensors of a mixture of E experts, as the kernels read them.

    Attributes:
        router: (E, K) weights of the router.
        gate_up: (E * 2 F, K) weights of all experts, for each gate before up.
        down: (E * K, F) weights.
        chosen: Number X of experts per row. Their probabilities are scaled to sum to 1.
    """

    router: Weight
    gate_up: Weight
    down: Weight
    chosen: int

    KNOWN: ClassVar = ("Qwen3VLMoeTextSparseMoeBlock",)  # Hugging Face's classes that choose and weight experts in this way

    @classmethod
    def of(cls, layer: Any) -> Experts | None:
        """Wrap a Hugging Face layer. None if it is not a mixture of experts, or one of another kind."""
        if type(layer).__name__ not in cls.KNOWN:
            return None
        router, experts = layer.gate, layer.experts
        weight = Weight(router, router.weight, router.weight)
        if isinstance(experts, QuantizedExperts):
            return cls(weight, Weight.of(experts.gate_up), Weight.of(experts.down), router.top_k)
        gate_up, down = experts.gate_up_proj.flatten(0, 1), experts.down_proj.flatten(0, 1)
        return cls(weight, Weight(experts, gate_up, gate_up), Weight(experts, down, down), router.top_k)

    @property
    def count(self) -> int:
        """Number of experts E."""
        return self.router.outputs


def linear(x_QK: Tensor, weights: tuple[Weight, ...], whole: torch.dtype | None = None) -> Tensor:
    """Multiply x by one to three weights, and concatenate the results: (1, Q, N), in x's dtype. whole: not used."""
    return torch.cat([w.times(x_QK) for w in weights], -1)[None]


def gated(x_QK: Tensor, gate: Weight, up: Weight, dtype: torch.dtype, kind: str = "full") -> Tensor:
    """Compute (Q, N) silu(gate(x)) * up(x). dtype: not used here."""
    return silu(gate.times(x_QK)) * up.times(x_QK)


def experts(x_QK: Tensor, layer: Experts) -> Tensor:
    """Send each row through its experts. Returns (X, Q, K) parts in x's dtype, whose sum is the layer's output."""
    chances_QE = layer.router.times(x_QK).softmax(-1, dtype=torch.float32)
    weights_QX, ids_QX = chances_QE.topk(layer.chosen)
    weights_QX = (weights_QX / weights_QX.sum(-1, keepdim=True)).to(x_QK.dtype)
    gate_up_ENK, down_EKF = (w.full_in(x_QK.dtype).unflatten(0, (layer.count, -1)) for w in (layer.gate_up, layer.down))
    parts = []
    for ids, weights in zip(ids_QX.unbind(1), weights_QX.unbind(1), strict=True):
        gate, up = (gate_up_ENK[ids] @ x_QK[..., None])[..., 0].chunk(2, -1)
        down = down_EKF[ids] @ (silu(gate) * up)[..., None]
        parts.append(down[..., 0] * weights[:, None])
    return torch.stack(parts)


def add_norm(x_QK: Tensor, parts_SQK: Tensor | None, weight_K: Tensor, eps: float, kind: str = "full") -> tuple[Tensor, Tensor]:
    """Add the sum of parts, if any, to x. Returns the total, and its RMSNorm times the weight; both (Q, K)."""
    total = x_QK if parts_SQK is None else x_QK + parts_SQK.sum(0).to(x_QK.dtype)
    return total, _normed(total, weight_K, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm over the last dimension, times the weight."""
    wide = x.float()  # always float32, as in Hugging Face's modules
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def all_reduce_add_norm(
    ranks: ProcessGroup, x_QK: Tensor, parts_SQK: Tensor, weight_K: Tensor, eps: float, kind: str = "full"
) -> tuple[Tensor, Tensor]:
    """Like `add_norm`, but sum the parts over ranks. Each rank rounds its sum first, as in Hugging Face's modules."""
    return add_norm(x_QK, ranks.sum(whole(parts_SQK, torch.empty_like(x_QK)))[None], weight_K, eps, kind)


def whole(parts_SQN: Tensor, out_QN: Tensor) -> Tensor:
    """Sum a linear layer's parts into `out`, rounded once, as the layer's own module does."""
    return out_QN.copy_(parts_SQN.sum(0))


def rope(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor,
    keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, at: int, heads: int,
    norms: tuple[Tensor, ...] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return (Q, H, D) rotated queries; write keys and values to cache slots base + at + row.

    parts and biases hold queries, keys and values in this order. cos, sin: (Q, D/2). base: (1,). heads: H. norms:
    weights (D,) of the RMSNorm of each query and of each key, if the model has them.
    """
    kv_heads, _, width = keys_JCD.shape
    rows_QN = parts_SQN.sum(0)
    if biases:
        rows_QN = rows_QN + torch.cat(biases).to(rows_QN.dtype)
    rows_QHD = rows_QN.to(keys_JCD.dtype).unflatten(-1, (-1, width))
    turning, values = rows_QHD[:, : heads + kv_heads], rows_QHD[:, heads + kv_heads :]
    if norms:
        parts = turning.split([heads, kv_heads], 1)
        turning = torch.cat([_normed(part, norm, eps) for part, norm in zip(parts, norms, strict=True)], 1)
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
    """Attend from each row to the first `base` slots and to those of the next T that `seen` (int8) marks.

    Returns (Q, H * D). The naive form: a mask over every slot of the cache, with keys and values repeated for each
    query head.
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
    # Masked slots may hold NaN, and zero times NaN is NaN.
    values = values.masked_fill(~seen_QC.any(0)[:, None], 0.0)
    weight_HQC = score_HQC.masked_fill(~seen_QC, float("-inf")).softmax(-1)
    return (weight_HQC @ values).transpose(0, 1).flatten(1).to(q_QHD.dtype)


def path_attention(
    q_QHD: Tensor, keys_JCD: Tensor, values_JCD: Tensor, base: Tensor, depths_Q: Tensor, ways_QP: Tensor, scale: float,
    kind: str = "full",
) -> Tensor:  # fmt: skip
    """Attend from each row to the first `base` slots and to the rows on its path, the first `depth + 1` of `ways`.

    Returns (Q, H * D). The kernel of the same name is bit-identical to a pass of one row; this one is plain masked
    attention, which is not.
    """
    on_QP = torch.arange(ways_QP.shape[1], device=ways_QP.device) <= depths_Q[:, None]
    rows = len(q_QHD)
    seen_QT = torch.zeros(rows, rows + 1, dtype=torch.int8, device=ways_QP.device)
    seen_QT.scatter_(1, torch.where(on_QP, ways_QP, rows), 1)  # padding goes to an extra column
    return attention(q_QHD, keys_JCD, values_JCD, base, seen_QT[:, :rows], scale, kind)


def top(logits_QV: Tensor, count: int) -> Tensor:
    """Return (Q, count) int64 token ids of the largest logits, largest first."""
    return logits_QV.topk(count).indices
