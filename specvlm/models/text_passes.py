"""Forward passes of a target's or draft's language model, which run the layers of the unmodified Hugging Face class.

Shape suffixes: S prompt tokens, Q rows of one pass, V vocabulary, D hidden size, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from specvlm.models.attention import AttentionCollector, StopForward
from specvlm.models.family import Family
from specvlm.models.fused import Forms
from specvlm.models.kv_cache import KVCache
from specvlm.models.partition import Stage, layer_by_layer
from specvlm.models.pauses import Pauses, finished
from specvlm.models.vision_probe import HiddenStateProbe
from specvlm.parallel.ranks import ProcessGroup
from specvlm.types import Features, entering

CHUNK = 24_576  # most rows of a prefill pass; activation memory grows with them (5.6 GB at a 32B model's widths)


class TextPasses(Family):
    """Passes of a language model over rows that are embedded already, or over tokens.

    Attributes:
        text: The language model.
        stages: Layers on each device.
        ranks: Processes that share every layer.
        forms: The forms in which modules run.
        vocabulary: Number of token ids.
    """

    text: Any
    stages: tuple[Stage, ...]
    ranks: ProcessGroup
    forms: Forms
    vocabulary: int

    def embed_tokens(self, tokens_S: Tensor) -> Tensor:
        """Embed token ids, (S, D). Ids beyond the vocabulary, from a target with a larger one, become the last id."""
        table = self.text.embed_tokens  # read once: a module finds its parts in Python
        return table(tokens_S.to(table.weight.device).clamp(0, self.vocabulary - 1))

    def forward(
        self,
        embeds_QD: Tensor | Features,
        positions_AQ: Tensor,
        cache: KVCache,
        mask_QK: Tensor | None,
        collector: AttentionCollector | None = None,
        states: HiddenStateProbe | None = None,
    ) -> Tensor:
        """Run one pass and append its rows to the cache. Returns the last hidden states, (Q, D).

        mask_QK: True where a row attends to a key. None: causal; every row also attends to everything in the cache.
        """
        return finished(self._layers(embeds_QD, positions_AQ, cache, mask_QK, collector, states))

    def _layers(
        self,
        embeds_QD: Tensor | Features,
        positions_AQ: Tensor,
        cache: KVCache,
        mask_QK: Tensor | None,
        collector: AttentionCollector | None,
        states: HiddenStateProbe | None,
    ) -> Pauses[Tensor]:
        """Do what `forward` does, with a pause after each layer."""
        device = embeds_QD.device
        mask = None if mask_QK is None else mask_QK[None, None].to(device)
        position_ids = positions_AQ.to(device)[:, None]
        position_ids = position_ids if self.axes > 1 else position_ids[0]
        extra = {} if collector is None else {"collector": collector}
        added_QLD = embeds_QD.added if isinstance(embeds_QD, Features) else None
        rows_1QD = entering(embeds_QD)[None]
        given = (rows_1QD, position_ids, cache, mask, extra, states, added_QLD, self.forms)
        hidden_1QD = yield from layer_by_layer(self.stages, self.text, *given)
        cache.advance(len(embeds_QD))
        return hidden_1QD[0]

    def head(self, hidden_QD: Tensor) -> Tensor:
        """Compute the logits (Q, V) of hidden states."""
        return self.hf.lm_head(hidden_QD)

    def prefill(
        self,
        embeds_SD: Tensor | Features,
        positions_AS: Tensor,
        cache: KVCache,
        cut: int = 0,
        collector: AttentionCollector | None = None,
        chunk: int = CHUNK,
    ) -> Tensor:
        """Fill an empty cache with a prompt, like `prefilling` without pauses. Returns the last hidden state (D,)."""
        return finished(self.prefilling(embeds_SD, positions_AS, cache, cut, collector, chunk))

    def prefilling(
        self,
        embeds_SD: Tensor | Features,
        positions_AS: Tensor,
        cache: KVCache,
        cut: int = 0,
        collector: AttentionCollector | None = None,
        chunk: int = CHUNK,
        joints: Sequence[int] = (),
    ) -> Pauses[Tensor]:
        """Fill a cache with a prompt, in passes of at most `chunk` rows. Returns the last hidden state (D,).

        Passes before `cut` begin at multiples of `chunk` and at `joints`, whatever follows: prompts with the same
        beginning compute it in the same passes.

        Args:
            embeds_SD: The rows after those that the cache holds already.
            positions_AS: Their rotary positions.
            cache: Cache to fill. It may hold the beginning of the prompt.
            cut: Slot at which a new pass begins (`VideoPrompt.cut`).
            collector: Reads attention in the last pass, which has all rows from `cut` on if `collector.whole`. If it
                stops the passes early, the returned state is empty.
            chunk: Maximum number of rows of a pass. A pass for a collector with `whole` may have more.
            joints: Further slots at which a pass begins (`VideoPrompt.joints`).
        """
        begin, total = cache.length, cache.length + len(embeds_SD)
        cache.offset = int(positions_AS[:, -1].max()) + 1 - total
        whole = collector is not None and collector.whole
        states = None if collector is None else collector.states
        fixed = {max(begin, start) for start in (0, *range(0, cut, chunk), *joints)}
        early = sorted(start for start in fixed if start < cut)
        starts = [*early, *_starts(max(begin, cut), total, total if whole else chunk)]
        ahead = None if collector is None else collector.ahead()
        for start, end in pairwise([*starts, total]):
            watch, rows = collector if end == total else ahead, slice(start - begin, end - begin)
            try:
                hidden_QD = yield from self._layers(embeds_SD[rows], positions_AS[:, rows], cache, None, watch, states)
            except StopForward:  # the collector needs no deeper layer
                cache.advance(end - start)
                hidden_QD = entering(embeds_SD).new_empty(1, 0)
            if collector is not None:
                collector.see(start, hidden_QD)
        if collector is not None:
            collector.gather(self.ranks)
        return hidden_QD[-1]

    def look_ahead(
        self,
        embeds_QD: Tensor | Features,
        positions_AQ: Tensor,
        cache: KVCache,
        collector: AttentionCollector | None,
        start: int,
        layers: int,
    ) -> None:
        """Run rows through the first layers only, so that a collector can read its signals there early.

        Their keys and values are written to the slots from `start` on, but the cache's length does not change: a later
        pass runs the rows through all layers and overwrites these slots.

        Args:
            embeds_QD: The rows.
            positions_AQ: Their rotary positions.
            cache: The model's cache, in which the layers have filled the slots before `start`.
            collector: Reads the signals.
            start: Slot of the first row.
            layers: Number of layers to run.
        """
        states, length = None if collector is None else collector.states, cache.length
        cache.length = start
        passing = self._layers(embeds_QD, positions_AQ, cache, None, collector, states)
        for _ in range(layers):
            next(passing)
        passing.close()
        cache.length = length

    def append_hidden(
        self,
        tokens_Q: Tensor,
        depths: Sequence[int] | Tensor,
        seen_QT: Tensor | None,
        cache: KVCache,
        position: int | None = None,
    ) -> Tensor:
        """Append text rows to the cache: a token, a tree, or one level of a tree. Returns hidden states (Q, D).

        Args:
            tokens_Q: Token ids.
            depths: Depth of each row, added to `position` to give its rotary position.
            seen_QT: Whether each row attends to each of the last T slots, which include these rows. All rows attend to
                all slots before. None: causal.
            cache: The model's cache.
            position: Rotary position of depth 0; by default that of the next slot.
        """
        positions = torch.as_tensor(depths) + (cache.position if position is None else position)
        embeds_QD, mask = self.embed_tokens(tokens_Q), None
        if seen_QT is not None:
            rows, device = tokens_Q.numel(), embeds_QD.device
            prefix = torch.ones(rows, cache.length + rows - seen_QT.shape[1], dtype=torch.bool, device=device)
            mask = torch.cat([prefix, seen_QT.to(device, torch.bool)], 1)
        return self.forward(embeds_QD, positions.expand(self.axes, -1), cache, mask)


def _starts(start: int, end: int, most: int) -> list[int]:
    """Return the starts of chunks of nearly equal length, none longer than `most`."""
    count = -(-(end - start) // most)
    return [start + (end - start) * piece // count for piece in range(count)]
