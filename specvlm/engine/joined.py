"""Passes through Hugging Face's modules: several requests' passes of one model run as one.

The rows of all passes go through every linear layer together, one after another in one sequence. Attention runs per
pass, over its own cache, so nothing is padded or copied, and its arithmetic is that of a pass run alone.

Shape suffixes: R rows of all passes, Q rows of a pass, K keys of a pass, T slots from its `base` on, H heads, D hidden
size or head width, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.models.attention import Part
from specvlm.models.partition import through
from specvlm.models.passes import Pass, Rows

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


def run_joined(model: VideoLM, passes: Sequence[Pass]) -> list[Rows]:
    """Run passes and return the rows of each. A pipelined or tensor-parallel model runs them one after another."""
    if len(passes) == 1:
        return [_run_single(model, passes[0])]
    if len(model.stages) > 1 or model.ranks.size > 1:
        return [_run_single(model, one) for one in passes]
    return _run_together(model, passes)


def _run_single(model: VideoLM, one: Pass) -> Rows:
    """Run one pass."""
    one.cache.length = start = one.start
    position = start - one.at + int(one.offset)
    hidden_QD = model.append_hidden(one.tokens_Q, one.depths_Q, one.seen_QT, one.cache, position)
    return Rows(hidden_QD, model.head)


def _run_together(model: VideoLM, passes: Sequence[Pass]) -> list[Rows]:
    """Run passes as one sequence of rows."""
    joined, device = _Joined(passes, model), model.device
    tokens_R = torch.cat([one.tokens_Q.to(device) for one in passes])
    positions_R = torch.cat([_positions(one, start, device) for one, start in zip(passes, joined.starts, strict=True)])
    position_ids = positions_R[None] if model.axes == 1 else positions_R.expand(model.axes, 1, -1)
    rows_1RD = model.embed_tokens(tokens_R)[None]
    given = rows_1RD, position_ids, joined, None, {"parts": joined.parts}
    hidden_RD = through(model.stages, model.text, *given, forms=model.forms)[0]
    for one, start in zip(passes, joined.starts, strict=True):
        one.cache.length = start + len(one)
    return [Rows(hidden_RD[rows], model.head) for rows in joined.rows]


def _positions(one: Pass, start: int, device: torch.device) -> Tensor:
    """(Q,) rotary positions of a pass's rows."""
    return torch.as_tensor(one.depths_Q, device=device) + (start - one.at + int(one.offset))


class _Joined:
    """Presents several caches as one to Hugging Face's language model, which calls `update` and `get_seq_length`."""

    def __init__(self, passes: Sequence[Pass], model: VideoLM) -> None:
        self.starts = [one.start for one in passes]
        self.rows = [slice(*ends) for ends in pairwise([0, *accumulate(map(len, passes))])]
        masks = [_mask(one, start, model) for one, start in zip(passes, self.starts, strict=True)]
        self._each = list(zip((one.cache for one in passes), self.rows, self.starts, masks, strict=True))

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write a layer's (1, H, R, D) rows to each pass's cache. Returns them unchanged; attention uses `parts`."""
        for cache, rows, start, _mask in self._each:
            keys, values = cache.layer(layer_idx)
            end = start + rows.stop - rows.start
            keys[:, :, start:end] = key[:, :, rows]
            values[:, :, start:end] = value[:, :, rows]
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots before the new rows, in the cache that is filled furthest."""
        return max(self.starts)

    def parts(self, layer: int) -> Iterator[Part]:
        """Yield each pass's rows, and the keys, values and mask of their attention."""
        for cache, rows, start, mask in self._each:
            keys, values = cache.layer(layer)
            end = start + rows.stop - rows.start
            yield Part(rows, keys[:, :, :end], values[:, :, :end], mask)


def _mask(one: Pass, start: int, model: VideoLM) -> Tensor | None:
    """(1, 1, Q, K) additive mask of a pass, or None if it is causal. Made once, not in every layer from a bool mask."""
    if one.seen_QT is None:
        return None
    mask_QK = torch.zeros(len(one), start + len(one), dtype=model.dtype, device=model.device)
    mask_QK[:, start - one.at :].masked_fill_(~one.seen(model.device, torch.bool), -torch.inf)
    return mask_QK[None, None]
