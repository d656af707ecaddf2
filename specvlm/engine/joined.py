"""Passes through Hugging Face's modules: several requests' passes of one model run as a batch.

Shape suffixes: B passes, Q rows of the longest pass, T cache slots in use, H KV heads, D head width or hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    return _run_batch(model, passes)


def _run_single(model: VideoLM, one: Pass) -> Rows:
    """Run one pass."""
    one.cache.length = start = one.start
    position = start - one.at + int(one.offset)
    hidden_QD = model.append_hidden(one.tokens_Q, one.depths_Q, one.seen_QT, one.cache, position)
    return Rows(hidden_QD, model.head)


def _run_batch(model: VideoLM, passes: Sequence[Pass]) -> list[Rows]:
    """Run passes as a batch. Padding rows attend to slot 0 only and are not written to any cache."""
    batch = _Batch(passes)
    count, rows, device = len(passes), batch.rows, model.device
    tokens_BQ = torch.zeros(count, rows, dtype=torch.int64, device=device)
    positions_BQ = torch.zeros(count, rows, dtype=torch.int64, device=device)
    seen_BQT = torch.zeros(count, 1, rows, batch.slots, dtype=torch.bool, device=device)
    for number, one in enumerate(passes):
        own, start = len(one), batch.starts[number]
        base = start - one.at
        tokens_BQ[number, :own] = one.tokens_Q.to(device)
        positions_BQ[number, :own] = torch.as_tensor(one.depths_Q, device=device) + base + int(one.offset)
        seen_BQT[number, 0, :own, :base] = True
        seen_BQT[number, 0, :own, base : start + own] = one.seen(device, torch.bool)
        seen_BQT[number, 0, own:, 0] = True
    embeds_BQD = model.embed_tokens(tokens_BQ)
    positions = positions_BQ if model.axes == 1 else positions_BQ.expand(model.axes, count, rows)
    out_BQD = through(model.stages, model.text, embeds_BQD, positions, batch, seen_BQT, {})
    for one, start in zip(passes, batch.starts, strict=True):
        one.cache.length = start + len(one)
    return [Rows(hidden_QD[: len(one)], model.head) for one, hidden_QD in zip(passes, out_BQD, strict=True)]


class _Batch:
    """Presents several caches as one to Hugging Face's language model, which calls only these two methods."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes, self.starts = passes, [one.start for one in passes]
        self.rows = max(map(len, passes))
        self.slots = max(self.starts) + self.rows

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append (B, H, Q, D) rows to each pass's own cache; return the batch's (B, H, T, D) keys and values."""
        shape = (len(self.passes), key.shape[1], self.slots, key.shape[3])
        both = [key.new_zeros(shape), value.new_zeros(shape)]
        for number, (one, start) in enumerate(zip(self.passes, self.starts, strict=True)):
            end = start + len(one)
            for all_BHTD, new_BHQD, store in zip(both, (key, value), one.cache.layer(layer_idx), strict=True):
                store[0, :, start:end] = new_BHQD[number, :, : len(one)]
                all_BHTD[number, :, :end] = store[0, :, :end]
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots before the new rows, in the cache that is filled furthest."""
        return self.slots - self.rows
