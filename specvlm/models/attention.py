"""The attention function our forward passes run through, and the side computation that reads guidance from it.

Registered with Hugging Face's own AttentionInterface, so that no modeling file is forked. Masks and the guidance
collector are arguments of the forward pass; nothing is set on a model.

Shape suffixes: H query heads, G query heads of one KV head, Q rows of this pass, K keys, N video tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "specvlm"


class Enough(Exception):
    """Raised inside a forward pass when the guidance asked for needs no deeper layer."""


class Guidance:
    """Attention from the rows of one pass to the video tokens, reduced layer by layer as it happens (SpecVLM, section 3).

    Never holds more than one KV head's (G, Q, K) block; what is kept is (N,) sums or, where asked for, (L, N).
    video_index: key slots of the video tokens. depth: stop the forward pass after that many layers (None: run it all).
    """

    def __init__(self, video_index: Tensor, *, rows: bool = True, last_row: bool = False, depth: int | None = None) -> None:
        self.video_index = video_index
        self.rows, self.last_row, self.depth = rows, last_row, depth
        self._mean: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """query (1, H, Q, D), key (1, H/G, K, D), after rotation. Reads only: the pass itself is not touched."""
        heads, count = query.shape[1], query.shape[2]
        rows = slice(None) if self.rows else slice(count - 1, count)
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1) if self.rows else None
        wide = torch.promote_types(query.dtype, torch.float32)  # 8 bits of mantissa would make false ties
        mean = last = query.new_zeros(())
        for head, key_KD in enumerate(key[0]):
            group = heads // key.shape[1]
            query_GQD = query[0, head * group : (head + 1) * group, rows]
            scores_GQK = (query_GQD.to(wide) @ key_KD.to(wide).mT) * scaling
            if future is not None:  # the last row alone sees every key
                scores_GQK[..., -count:].masked_fill_(future, float("-inf"))
            weights_GQN = scores_GQK.softmax(-1).index_select(-1, self.video_index)
            mean = mean + weights_GQN.mean(1).sum(0)
            last = last + weights_GQN[:, -1].sum(0)
        if self.rows:
            self._mean[layer] = mean / heads
        if self.last_row:
            self._last[layer] = last / heads
        if self.depth is not None and layer + 1 >= self.depth:
            raise Enough

    def per_layer(self) -> Tensor:
        """(L, N), mean over heads and rows."""
        return torch.stack([self._mean[layer] for layer in sorted(self._mean)])

    def last_rows(self) -> Tensor:
        """(L, N), the last row alone, mean over heads."""
        return torch.stack([self._last[layer] for layer in sorted(self._last)])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    guidance: Guidance | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; without a mask it is causal, and then every key must belong to this pass."""
    causal = attention_mask is None and query.shape[2] > 1
    assert not causal or query.shape[2] == key.shape[2], "a causal pass over an existing prefix needs an explicit mask"
    grouped = key.shape[1] != query.shape[1]
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    if guidance is not None:
        guidance.observe(int(module.layer_idx), query, key, float(scaling or query.shape[-1] ** -0.5))  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="specvlm"` known. The mask function keeps a bare `generate` right under that name too."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
