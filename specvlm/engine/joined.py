"""Passes of one model over Hugging Face's modules: one by itself, several requests' as a batch.

Shape suffixes: B passes, Q rows of the longest, T slots up to the last row's own, H KV heads, D width of a head or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.models.passes import Pass, Rows

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


def run_joined(model: VideoLM, passes: Sequence[Pass]) -> list[Rows]:
    """The rows of each pass. A model that is split over devices, or shared by ranks, runs one after another."""
    if len(passes) == 1 or len(model.stages) > 1 or model.ranks.size > 1:
        return [_alone(model, one) for one in passes]
    return _joined(model, passes)


def _alone(model: VideoLM, one: Pass) -> Rows:
    one.cache.length = start = one.start
    position = start - one.at + int(one.offset)
    hidden_QD = model.append_hidden(one.tokens_Q, one.depths_Q, one.seen_QT, one.cache, position)
    return Rows(hidden_QD, model.head)


def _joined(model: VideoLM, passes: Sequence[Pass]) -> list[Rows]:
    """Shorter passes are filled up with rows that see slot 0 alone, and are written nowhere."""
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
    out = model.text(
        inputs_embeds=embeds_BQD,
        position_ids=positions,
        attention_mask={"full_attention": seen_BQT, "sliding_attention": seen_BQT},
        past_key_values=batch,
        use_cache=True,
    )
    for one, start in zip(passes, batch.starts, strict=True):
        one.cache.length = start + len(one)
    return [Rows(hidden_QD[: len(one)], model.head) for one, hidden_QD in zip(passes, out.last_hidden_state, strict=True)]


class _Batch:
    """The caches of several passes as one to Hugging Face's attention layers, which call these two methods alone."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes, self.starts = passes, [one.start for one in passes]
        self.rows = max(map(len, passes))
        self.slots = max(self.starts) + self.rows

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write each pass's rows, (B, H, Q, D), behind its own cache; the batch's keys and values, (B, H, T, D)."""
        shape = (len(self.passes), key.shape[1], self.slots, key.shape[3])
        both = [key.new_zeros(shape), value.new_zeros(shape)]
        for number, (one, start) in enumerate(zip(self.passes, self.starts, strict=True)):
            end = start + len(one)
            for all_BHTD, new_BHQD, store in zip(both, (key, value), one.cache.layer(layer_idx), strict=True):
                store[0, :, start:end] = new_BHQD[number, :, : len(one)]
                all_BHTD[number, :, :end] = store[0, :, :end]
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots - self.rows
