"""Attention function of vision towers, over whole images or inside windows. Shape suffixes: H heads, R rows, D size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from specvlm.models.vision_probe import VisionProbe


def attend_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sight: VisionProbe | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a vision tower: over the whole image (SigLIP), or inside the windows of one sequence.

    Windows of equal length are batched into one call, which is as exact as one call per window.

    Args:
        module: The attention module that calls.
        query: (B, H, Q, D), like key and value. B is 1 if there are windows.
        attention_mask: Used only without windows.
        cu_seq_lens_q: (windows + 1,) offsets where the windows start, then the end of the sequence. Best on the CPU,
            since the host reads them. None: attention over the whole image.
        sight: Records the attention that patches receive. Used only with windows.

    Returns:
        (B, Q, H, D) output, and None instead of attention weights.
    """
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    lengths = cu_seq_lens_q.cpu().diff()
    query_QHD, key_QHD, value_QHD = (x[0].transpose(0, 1) for x in (query, key, value))
    if sight is not None:
        sight.observe(module, query_QHD, key_QHD, lengths, scaling)
    if len(kinds := lengths.unique().tolist()) == 1:
        return _in_windows(query_QHD, key_QHD, value_QHD, kinds[0], scaling)[None], None
    length_of_row = lengths.repeat_interleave(lengths)
    out_QHD = torch.empty_like(query_QHD, memory_format=torch.contiguous_format)
    for length in kinds:
        rows = (length_of_row == length).nonzero().flatten().to(query.device)
        out_QHD[rows] = _in_windows(query_QHD[rows], key_QHD[rows], value_QHD[rows], length, scaling)
    return out_QHD[None], None


def _in_windows(query_RHD: Tensor, key_RHD: Tensor, value_RHD: Tensor, length: int, scaling: float | None) -> Tensor:
    """(R, H, D) attention inside windows of `length` consecutive rows."""
    query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query_RHD, key_RHD, value_RHD))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)
