"""Shared by drafters that run a model over the pruned prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specvlm.strategies import DraftContext, DraftSession

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


def drafting_model(ctx: DraftContext, which: str | None) -> VideoLM:
    """Return the model that a drafter runs, by its attribute `model`, "draft" or "target"."""
    model = ctx.target if which == "target" else ctx.draft
    assert model is not None
    return model


class PrunedSession(DraftSession):
    """Session with a KV cache of its own: the pruned prompt, then accepted tokens, then the rows of the current tree.

    A round compacts the accepted rows, then feeds the last accepted node of the old tree and the new root. The former
    is fed again because its row may be missing (leaves are not expanded); on a GPU two rows cost as much as one. If
    routines are not captured and the row is in the cache, `TreeSession` feeds only the root.

    Args:
        ctx: Context of the request.
        model: The model that drafts.
        rows: Maximum number of rows that a round writes, without that of the last accepted node.
    """

    def __init__(self, ctx: DraftContext, model: VideoLM, rows: int) -> None:
        self.ctx, self.model, self.device = ctx, model, model.head_device
        self.cache = ctx.prefill.start(ctx, model, rows + 2)
        # Key of the coupled rule's noise: the seed, and the slot of the answer's first token.
        self.noise = (ctx.seed or 0, self.cache.length)
        self.root = self.cache.length - 1  # slot of the last root; at first, slot of the prompt's last token
        self.free = self.cache.capacity - rows - 2  # a trial run of a routine writes from this slot on
