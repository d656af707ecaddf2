"""Fused forms of Hugging Face's modules: functions that compute what a module's `forward` does, with fewer operations.

A module is recognised by its parts, not by its class, so that releases and families share a form. `fused.py` tries each
form before it is used.

Shape suffixes: Q rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from specvlm.models.attention import NAME, VISION, attend
from specvlm.models.vision_attention import attend_windows

Forward = Callable[..., Any]
SILU = ("SiLU", "SiLUActivation")
BLOCKS = (("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"), ("norm1", "attn", "norm2", "mlp"))


class Form(NamedTuple):
    """A fused form of a module.

    Attributes:
        forward: Takes the arguments of the module's own `forward`.
        width: Width of the rows that it takes.
        place: "text" for a decoder layer or its attention, "vision" for a block of a vision tower or its attention, ""
            for a module that takes nothing but rows.
        head: Width of a head, if `place` is "vision".
    """

    forward: Forward
    width: int
    place: str = ""
    head: int = 0


def form_of(module: Any, ops: Any) -> Form | None:
    """Make the fused form of a module; None if there is none. ops: module with the operations, `fused_kernels`."""
    if is_norm(module):
        return Form(lambda x_QD: ops.norm(x_QD, module.weight, module.variance_epsilon), len(module.weight))
    if _has(module, "gate_proj", "up_proj", "down_proj", "act_fn") and type(module.act_fn).__name__ in SILU:
        return _gated(module, ops)
    if _has(module, "q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx") and _runs(module, NAME):
        return _text_attention(module, ops)
    if _has(module, "qkv", "proj", "num_heads", "scaling") and _runs(module, VISION):
        return _vision_attention(module, ops)
    return _patches(module) or _block(module, ops)


def is_norm(module: Any) -> bool:
    """Whether a module looks like an RMSNorm."""
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and getattr(getattr(module, "weight", None), "ndim", 0) == 1


def _has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _runs(module: Any, attention: str) -> bool:
    """Whether a module calls our attention function of this name."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == attention


def _gated(module: Any, ops: Any) -> Form:
    def forward(x_QD: Tensor) -> Tensor:
        return module.down_proj(ops.gate(module.gate_proj(x_QD), module.up_proj(x_QD)))

    return Form(forward, module.gate_proj.in_features)


def _text_attention(module: Any, ops: Any) -> Form:
    norms = [norm for norm in (getattr(module, name, None) for name in ("q_norm", "k_norm")) if norm is not None]
    eps = norms[0].variance_epsilon if norms and all(map(is_norm, norms)) else 0.0
    width = module.head_dim

    def forward(
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        cos_BQD, sin_BQD = position_embeddings
        if cos_BQD.shape != (1, hidden_states.shape[1], width) or cos_BQD.dtype != hidden_states.dtype:
            raise ValueError("rotates a part of its heads, or in another dtype")  # in the trial already
        projections = module.q_proj, module.k_proj, module.v_proj
        query, key, value = (project(hidden_states).unflatten(-1, (-1, width)) for project in projections)
        ops.turn(query[0], key[0], cos_BQD[0], sin_BQD[0], True, tuple(norm.weight for norm in norms), eps)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        read, _ = attend(module, query, key, value, attention_mask, module.scaling, **more)
        return module.o_proj(read.flatten(2)), None

    return Form(forward, module.q_proj.in_features, "text")


def _vision_attention(module: Any, ops: Any) -> Form:
    own, heads = module.forward, module.num_heads
    width = module.qkv.out_features // 3 // heads

    def forward(
        hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **more: Any
    ) -> Tensor:
        if position_embeddings is None or position_embeddings[0].shape != (len(hidden_states), width):
            return own(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **more)
        query, key, value = module.qkv(hidden_states).unflatten(-1, (3, heads, width)).unbind(1)  # (Q, H, D), no copy
        ops.turn(query, key, *position_embeddings, False)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        read, _ = attend_windows(module, query, key, value, None, module.scaling, cu_seq_lens_q=cu_seqlens, **more)
        return module.proj(read.reshape(len(hidden_states), -1))

    return Form(forward, module.qkv.in_features, "vision", width)


def _patches(module: Any) -> Form | None:
    """Make the form of a tower's patch embedding: each patch is one row, so the convolution is a matrix product."""
    conv = getattr(module, "proj", None)
    if type(conv) is not nn.Conv3d or (conv.kernel_size, conv.padding, conv.groups) != (conv.stride, (0, 0, 0), 1):
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        rows_QD = hidden_states.to(conv.weight.dtype).reshape(-1, conv.weight[0].numel())
        return linear(rows_QD, conv.weight.flatten(1), conv.bias)

    return Form(forward, conv.weight[0].numel())


def _block(module: Any, ops: Any) -> Form | None:
    """Make the form of a decoder layer or a tower's block: one kernel adds the attention's output and norms the sum."""
    parts = dict(module.named_children())
    names = next((names for names in BLOCKS if parts.keys() == set(names)), None)
    if names is None or not is_norm(parts[names[2]]):
        return None
    before, attention, after, mlp = (parts[name] for name in names)

    def forward(hidden_states: Tensor, **more: Any) -> Tensor:
        read = first(attention(hidden_states=before(hidden_states), **more))
        added, normed = ops.add_norm(hidden_states, read, after.weight, after.variance_epsilon)
        return added.add_(mlp(normed))  # `added` is this block's own

    place = "text" if names[0] == "input_layernorm" else "vision"
    head = after.weight.numel() // getattr(attention, "num_heads", 1)
    return Form(forward, after.weight.numel(), place, head)


def first(found: Any) -> Any:
    """Return the first of several results, or the only one."""
    return found[0] if isinstance(found, tuple) else found
