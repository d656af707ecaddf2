"""MemStream: keep patches that changed, from the frames that two retrievals rank highest.

Symbols and shape suffixes: B budget, N video tokens of one video, X experts, F frames, E = F - 1 pairs of neighbouring
frames, P tokens of one frame, U units that are ranked (frames or tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice, check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import adjacent_cosine
from specvlm.types import KeepSet

EXPERTS = ("verifier_attention", "text_similarity", "verifier_attention_last_row", "features")
UNITS = ("frame", "token")
FUSIONS = ("reciprocal", "mean")


@dataclass(frozen=True)
class MemStreamPruner(Pruner):
    """Keep the patches that changed, from the frames that two retrievals rank highest. MemStream (arXiv 2602.18434).

    Adaptive key selection: a token is a key if its cosine distance to the same cell one frame earlier exceeds `change`;
    all tokens of the first frame are keys. Retrieval: score(f) = sum over experts e of 1 / (c + rank_e(f)), reciprocal
    rank fusion. rank_e(f) is 1 for the frame of highest mean s_e over its tokens; ties share the better rank. The
    internal expert is the model's own query . key, `verifier_attention`; the external one compares the vision tower's
    features with the question's embeddings, `text_similarity` at the input of layer 0. Keys are taken frame by frame,
    from the highest score on and in raster order within the last frame, until there are B; then the other tokens in the
    same order.

    Options of ours: experts may also name `verifier_attention_last_row` (the last prompt row's attention, mean over
    layers) and `features` (the change itself; the first frame has that of the second).

    Deviations: the paper drops keys while it encodes, and retrieves whole frames of the cache; here both choose the
    drafter's context after one full prefill. Its external encoder is another model, which a target does not have. B
    tokens are kept, where the paper retrieves a number of frames. The paper's `change` was not found; 0.1 is ours. c =
    60 is customary for reciprocal rank fusion.

    Signals: those of the experts, and features. Cost: N D and a sort of N; for text_similarity one (N, D) tensor of the
    target, held until its prefill ends. Limits: ranks do not tell by how much an expert prefers a frame; slow changes
    are not detected.

    Attributes:
        experts: Signals to rank by.
        change: Cosine distance to the previous frame above which a token is a key; below 0 all tokens are keys.
        c: Constant of the reciprocal rank fusion, 0 or more.
        fusion: `reciprocal`, or `mean` (ours): the mean of ranks in 0..1, where ties share the mean of their ranks.
        detrend: Subtract the least-squares line over time from each expert's frame means (ours), since similarity to
            the question drifts upwards.
        unit: Rank each `frame`, or each `token` (ours).

    Raises:
        UserError: A field has none of these values.
        ValueError: A score is NaN.
    """

    name = "memstream"
    paper = "MemStream (arXiv 2602.18434)"
    fidelity = "adapted"
    experts: tuple[str, ...] = EXPERTS[:2]
    change: float = 0.1
    c: float = 60.0
    fusion: str = "reciprocal"
    detrend: bool = False
    unit: str = "frame"

    def __post_init__(self) -> None:
        if not self.experts:
            raise UserError(f"memstream: experts must name some of {', '.join(EXPERTS)}, got none")
        for expert in self.experts:
            check_choice("memstream: experts", expert, EXPERTS)
        check_choice("memstream: fusion", self.fusion, FUSIONS)
        check_choice("memstream: unit", self.unit, UNITS)
        check_range("memstream: c", self.c, 0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.experts) | ({"features"} if self.change >= 0 else frozenset())

    def state_layer(self, layers: int) -> int:
        """DART's layer, so that a sweep reads both in one prefill.

        Any layer would do, since `text_similarity` is read at the input.
        """
        return min(2, layers)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        shape = (ctx.grid.frames, ctx.grid.per_frame)
        scores_XFP = torch.stack([self.scores(expert, ctx).view(shape) for expert in self.experts])
        if self.detrend:
            scores_XFP = detrended(scores_XFP)
        if self.unit == "frame":
            score_N = self.fused(scores_XFP.mean(2)).repeat_interleave(shape[1])
        else:
            score_N = self.fused(scores_XFP.flatten(1))
        if bool(score_N.isnan().any()):
            raise ValueError(f"memstream cannot rank by {', '.join(self.experts)}: there are NaNs")
        order_N = score_N.sort(descending=True, stable=True).indices
        other_N = ~self.keys(ctx)
        order_N = order_N[other_N[order_N].byte().sort(stable=True).indices]
        return KeepSet(order_N[: ctx.budget].sort().values, ctx.total)

    def keys(self, ctx: PruneContext) -> Tensor:
        """(N,) bool: True for tokens that changed."""
        if self.change < 0:
            return torch.ones(ctx.total, dtype=torch.bool, device=ctx.device)
        change_EP = changes(ctx)
        first_P = torch.ones_like(change_EP[:1], dtype=torch.bool) if len(change_EP) else change_EP.new_ones(1, ctx.total) > 0
        return torch.cat([first_P, change_EP > self.change]).flatten()

    def scores(self, expert: str, ctx: PruneContext) -> Tensor:
        """(N,) scores of an expert, in float64, since a line may be subtracted."""
        if expert == "features":
            change_EP = changes(ctx)
            first_P = change_EP[:1] if len(change_EP) else change_EP.new_zeros(1, ctx.total)
            return torch.cat([first_P, change_EP]).flatten().double()
        signal = ctx.signal(expert).double()
        if expert == "verifier_attention_last_row":
            return signal.mean(0)
        return signal[0] if expert == "text_similarity" else signal

    def fused(self, scores_XU: Tensor) -> Tensor:
        """(U,) the experts' ranks, fused to one score."""
        if self.fusion == "mean":
            return torch.stack([ranks(score_U) for score_U in scores_XU]).mean(0)
        return torch.stack([1 / (self.c + places(score_U)) for score_U in scores_XU]).sum(0)


def changes(ctx: PruneContext) -> Tensor:
    """(E, P) cosine distance of each cell to itself one frame earlier."""
    (x_FPD,) = ctx.by_frame(ctx.features)
    return 1 - adjacent_cosine(x_FPD)


def places(score_U: Tensor) -> Tensor:
    """(U,) places, 1 for the highest score; ties share the better place. Scores are compared in float32."""
    ordered_U = score_U.float().sort().values
    place_U = 1 + len(score_U) - torch.searchsorted(ordered_U, score_U.float(), right=True)
    return place_U.double().masked_fill(score_U.isnan(), float("nan"))


def detrended(scores_XFP: Tensor) -> Tensor:
    """Subtract the least-squares line over time through the frame means."""
    frames = scores_XFP.shape[1]
    time_F = torch.arange(frames, device=scores_XFP.device, dtype=scores_XFP.dtype) - (frames - 1) / 2
    slope_X = (scores_XFP.mean(2) * time_F).sum(1) / time_F.square().sum().clamp(min=1e-9)
    return scores_XFP - (slope_X[:, None] * time_F)[:, :, None]


def ranks(score_N: Tensor) -> Tensor:
    """(N,) ranks in 0..1, 1 for the highest score; ties share the mean rank. Scores are compared in float32."""
    ordered_N = score_N.float().sort(stable=True).values
    low_N = torch.searchsorted(ordered_N, score_N.float())
    high_N = torch.searchsorted(ordered_N, score_N.float(), right=True)
    rank_N = (low_N + high_N - 1).double() / max(2 * (len(score_N) - 1), 1)
    return rank_N.masked_fill(score_N.isnan(), float("nan"))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [MemStreamPruner]
