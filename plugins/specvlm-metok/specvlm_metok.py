"""METok's first stage: cut the video into events, and pool frames more coarsely the less relevant they are.

Shape suffixes: N video tokens of one video, F frames, E = F - 1 pairs of neighbouring frames, P tokens of one frame,
D width.
"""

from dataclasses import dataclass

import torch

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import adjacent_cosine, block_of, cuts, spans
from specvlm.types import KeepSet


@dataclass(frozen=True)
class MeTokPruner(Pruner):
    """Pool frames at several resolutions, finest where the question points. METok, first stage (arXiv 2506.02850).

    The video is cut into events at the `events` - 1 least similar neighbouring frames (cosine of mean features; ties go
    to the earlier cut). The relevance of a frame is the target's attention to it, summed over its tokens; that of an
    event is its best frame's. The `key_events` best events are key events. In a key event, the `top_frames` most
    relevant frames are pooled with stride 2, the others with 4; in other events with 4 and 8. A pooled token is the
    mean of its block of cells, placed at the middle of the block.

    Deviations: the paper's relevance is the cosine of SigLIP's image and text towers, which a target need not have, and
    its pooling is bilinear. It has no budget: here all strides are halved or doubled together, to the finest that fit.
    Then frames, ordered by stride and relevance, are each pooled one level finer while the budget allows. If one token
    per frame is too much, the least relevant frames are dropped. Its stages 2 and 3, which prune inside the language
    model, are left out.

    Signals: features, verifier_attention. Cost: N D, and a loop over frames on the host. Limits: small budgets lose
    fine detail everywhere; some of the budget may stay unspent.

    Attributes:
        events: Number of events; the paper's 5.
        key_events: Number of key events; the paper's 3.
        top_frames: Frames per event that are pooled more finely; the paper's 6.

    Raises:
        UserError: A field is out of range.
        ValueError: The attention contains NaN.
    """

    name = "metok"
    paper = "METok (arXiv 2506.02850)"
    fidelity = "adapted"
    needs = frozenset({"features", "verifier_attention"})
    events: int = 5
    key_events: int = 3
    top_frames: int = 6

    def __post_init__(self) -> None:
        check_range("metok: events", self.events, 1)
        check_range("metok: key_events", self.key_events, 0)
        check_range("metok: top_frames", self.top_frames, 0)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), (attention_FP,) = ctx.by_frame(ctx.features.float()), ctx.by_frame(ctx.scores("verifier_attention").double())
        relevance = attention_FP.sum(1).tolist()
        events = spans(cuts(adjacent_cosine(x_FPD.mean(1)), least=self.events))
        grid = ctx.grid
        strides = fitted(self.levels(relevance, events), relevance, grid.height, grid.width, ctx.budget)
        owner_FP = torch.full_like(attention_FP, -1, dtype=torch.int64)
        for stride in sorted({s for s in strides if s}):
            frame_F = torch.tensor([f for f, s in enumerate(strides) if s == stride], device=ctx.device)
            owner_FP[frame_F] = frame_F[:, None] * grid.per_frame + block_of(grid.height, grid.width, stride, ctx.device)
        here_N = torch.arange(ctx.total, device=ctx.device)
        return KeepSet.merge(owner_FP.flatten(), here_N, torch.ones_like(here_N), ctx.total)

    def levels(self, relevance: list[float], events: list[tuple[int, int]]) -> list[int]:
        """Return log2 of the paper's stride for each frame."""
        levels = [0] * len(relevance)
        order = sorted(range(len(events)), key=lambda e: -max(relevance[slice(*events[e])]))
        for place, event in enumerate(order):
            frames = sorted(range(*events[event]), key=lambda f: -relevance[f])
            for nth, frame in enumerate(frames):
                levels[frame] = 1 + (place >= self.key_events) + (nth >= self.top_frames)
        return levels


def fitted(levels: list[int], relevance: list[float], height: int, width: int, budget: int) -> list[int]:
    """Return the stride of each frame, 0 for a dropped one, so that all pooled tokens fit the budget."""
    coarsest = (max(height, width) - 1).bit_length()

    def tokens(level: int) -> int:
        return -(-height // 2**level) * -(-width // 2**level)

    shift = -max(levels)
    shifted = [min(max(level + shift, 0), coarsest) for level in levels]
    while sum(map(tokens, shifted)) > budget and min(shifted) < coarsest:
        shift += 1
        shifted = [min(max(level + shift, 0), coarsest) for level in levels]
    order = sorted(range(len(levels)), key=lambda f: (levels[f], -relevance[f]))
    kept = order[: budget // tokens(coarsest)] if min(shifted) == coarsest else order
    spare = budget - sum(tokens(shifted[frame]) for frame in kept)
    for frame in kept:
        finer = max(shifted[frame] - 1, 0)
        cost = tokens(finer) - tokens(shifted[frame])
        if cost <= spare:
            shifted[frame], spare = finer, spare - cost
    return [2 ** shifted[frame] if frame in set(kept) else 0 for frame in range(len(levels))]


@hookimpl
def specvlm_strategies() -> list[type]:
    return [MeTokPruner]
