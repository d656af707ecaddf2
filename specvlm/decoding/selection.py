"""Which video tokens the drafter sees: how many, who chooses them, and the pruner's choice.

Shape suffixes: N video tokens, D hidden size.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specvlm.decoding.collect import collector_for, draft_attention, signals_for
from specvlm.errors import line
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import Drafter, PruneContext, Pruner
from specvlm.strategies.fence import inside
from specvlm.types import Features, KeepSet, VideoPrompt

RECORDED = frozenset({"verifier_attention"})


class View(NamedTuple):
    """Number of video tokens that the drafter may see, and who chooses them: the drafter, the pruner, or neither."""

    budget: int
    own: bool  # the drafter chooses them itself
    pruned: bool  # the pruner chooses them


@dataclass(frozen=True)
class Selection:
    """Chooses the video tokens that the drafter sees.

    Attributes:
        pruner: The pruner.
        drafter: The drafter.
        target: The target.
        drafting: The model that drafts, if any does.
        caches: Source of a cache for a signal of that model.
    """

    pruner: Pruner
    drafter: Drafter
    target: VideoLM
    drafting: VideoLM | None
    caches: CachePool

    def view(self, prompt: VideoPrompt, ratio: float) -> View:
        """Return how many video tokens the drafter sees, and who chooses them.

        The drafter chooses if it has a budget of its own. Else the pruner does, unless all or none are kept, or no
        model drafts.
        """
        total = len(prompt.video_index)
        with inside(self.drafter):
            own = self.drafter.own_budget(prompt.copy(pixels=False))
        if own is not None:
            return View(own, own=True, pruned=False)
        budget = total if self.pruner.keeps_all else KeepSet.budget(total, ratio)
        return View(budget, own=False, pruned=self.drafter.model is not None and 0 < budget < total)

    def collector(self, prompt: VideoPrompt, view: View, record: bool, hidden: bool) -> AttentionCollector | None:
        """Make the collector of the signals of the target's prefill; None if none is read, or there is no video.

        record: Also collect the attention of the text to the video. hidden: As in `collector_for`.
        """
        if not len(prompt.video_index):
            return None
        more = self.drafter.needs | (RECORDED if record else frozenset())
        return collector_for(self.pruner if view.pruned else None, self.target, prompt, more, hidden)

    def on_rank0(
        self,
        prompt: VideoPrompt,
        view: View,
        collector: AttentionCollector | None,
        features_ND: Tensor | Features,
        generator: torch.Generator,
    ) -> KeepSet:
        """Run `select`, then use rank 0's choice on all ranks.

        Rank 0 and the ranks that hold the draft run it; without a draft, all ranks do.
        """
        ranks, here = self.target.ranks, self.drafting is None or self.drafting.device.type != "meta"
        keep = self.select(prompt, view, collector, features_ND, generator) if here or not ranks.rank else None
        if ranks.size > 1:
            keep, state = ranks.share(lambda: (keep and keep.cpu(), generator.get_state()))
            generator.set_state(state)
        assert keep is not None
        return keep

    def select(
        self,
        prompt: VideoPrompt,
        view: View,
        collector: AttentionCollector | None,
        features_ND: Tensor | Features,
        generator: torch.Generator,
        drafted_ND: Tensor | Features | None = None,
    ) -> KeepSet:
        """Ask the pruner which video tokens to keep. If `view` is not pruned, keep all, or none if its budget is 0.

        drafted_ND: Video features of the model that drafts, if they are known.

        Raises:
            ValueError: The pruner's `KeepSet` does not fit its budget.
        """
        total, pruner = len(prompt.video_index), self.pruner
        if not view.pruned:
            return KeepSet.everything(total) if view.budget else KeepSet(torch.empty(0, dtype=torch.int64), total)
        signals = signals_for(pruner, self.target, prompt, collector, features_ND)
        if "draft_attention_last_row" in pruner.needs:
            features = features_ND if self.drafting is self.target else drafted_ND
            signals["draft_attention_last_row"] = draft_attention(self.drafting, prompt, features, pruner, self.caches)
        context = PruneContext(tuple(map(copy, prompt.grids)), view.budget, signals, generator, self.target.device)
        with inside(pruner):
            keep = pruner.select(context)
            if not isinstance(keep, KeepSet) or keep.total != total or len(keep.index) > view.budget:
                kept = f"kept {len(keep.index)} of {keep.total} tokens" if isinstance(keep, KeepSet) else ""
                got = kept or f"gave a {type(keep).__name__}"
                raise ValueError(f"pruner {pruner.name} {got}, its budget was {view.budget} of {total}")
            return KeepSet(keep.index, total, keep.pool, line(str(keep.note)))  # a subclass may have skipped KeepSet's checks
