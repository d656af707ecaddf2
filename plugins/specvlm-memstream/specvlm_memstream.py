"""MemStream's mixture: the mean of rank-normalised experts, each freed of its drift over time.

Shape suffixes: N video tokens of one video, X experts, L layers, F frames, P tokens of one frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specvlm.errors import UserError, check_choice
from specvlm.plugins import hookimpl
from specvlm.segments import adjacent_cosine
from specvlm.strategy import PruneContext, Pruner
from specvlm.types import KeepSet

EXPERTS = ("verifier_attention", "verifier_attention_last_row", "features")
UNITS = ("token", "frame")


@dataclass(frozen=True)
class MemStreamPruner(Pruner):
    """Keep the B tokens of highest mean rank over several experts. After MemStream (arXiv 2602.18434).

    score = mean over experts e of rank(s_e - trend_e) in 0..1, equal scores sharing the mean of their ranks. trend_e is the
    least-squares line through the frame means of s_e over time: similarity of question and frame drifts upwards with time,
    and favours late frames. The paper mixes internal and external encoders when it retrieves frames; its exact rule was not
    found, so the experts are ours: verifier_attention (the question's attention), verifier_attention_last_row (the last
    prompt row's, mean over layers), and features (cosine distance to the same cell one frame earlier; the first frame has
    that of the second).

    experts: some of these three. detrend: False leaves the drift in. unit: `token`, or `frame`, which ranks the mean score of
    frames and takes them in full, the last in raster order. Signals: those of the experts. Cost: N D and a sort of N
    an expert. Limits: ranks forget by how much an expert prefers a token.
    Raises UserError for other experts or units, ValueError where a score is NaN.
    """

    name = "memstream"
    experts: tuple[str, ...] = EXPERTS
    detrend: bool = True
    unit: str = "token"

    def __post_init__(self) -> None:
        if not self.experts:
            raise UserError(f"memstream: experts must name some of {', '.join(EXPERTS)}, got none")
        for expert in self.experts:
            check_choice("memstream: experts", expert, EXPERTS)
        check_choice("memstream: unit", self.unit, UNITS)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.experts)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        shape = (ctx.grid.frames, ctx.grid.per_frame)
        scores_XN = torch.stack([self.scores(expert, ctx) for expert in self.experts])
        if self.detrend:
            scores_XN = detrended(scores_XN.unflatten(1, shape)).flatten(1)
        score_N = torch.stack([ranks(score_N) for score_N in scores_XN]).mean(0)
        if self.unit == "frame":
            score_N = score_N.view(shape).mean(1, keepdim=True).expand(shape).flatten()
        return KeepSet.top(score_N, ctx.budget)

    def scores(self, expert: str, ctx: PruneContext) -> Tensor:
        """(N,) in float64, since a line is subtracted."""
        signal = ctx.signal(expert)
        if expert == "verifier_attention":
            return signal.double()
        if expert == "verifier_attention_last_row":
            return signal.double().mean(0)
        (x_FPD,) = ctx.by_frame(signal)
        change_EP = 1 - adjacent_cosine(x_FPD)
        first_P = change_EP[:1] if len(change_EP) else change_EP.new_zeros(1, x_FPD.shape[1])
        return torch.cat([first_P, change_EP]).flatten().double()


def detrended(scores_XFP: Tensor) -> Tensor:
    """Less the least-squares line in time through the frame means."""
    frames = scores_XFP.shape[1]
    time_F = torch.arange(frames, device=scores_XFP.device, dtype=scores_XFP.dtype) - (frames - 1) / 2
    slope_X = (scores_XFP.mean(2) * time_F).sum(1) / time_F.square().sum().clamp(min=1e-9)
    return scores_XFP - (slope_X[:, None] * time_F)[:, :, None]


def ranks(score_N: Tensor) -> Tensor:
    """Ranks in 0..1, the highest score 1; equal scores share the mean of their ranks. Scores are compared in float32."""
    ordered_N = score_N.float().sort(stable=True).values
    low_N = torch.searchsorted(ordered_N, score_N.float())
    high_N = torch.searchsorted(ordered_N, score_N.float(), right=True)
    rank_N = (low_N + high_N - 1).double() / max(2 * (len(score_N) - 1), 1)
    return rank_N.masked_fill(score_N.isnan(), float("nan"))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [MemStreamPruner]
