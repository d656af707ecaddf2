"""V-CAST: give more tokens to frames where the video turns, and keep the tokens least similar to their frame's mean.

Shape suffixes: F frames, P tokens of one frame, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from specvlm.errors import check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import at_once
from specvlm.types import KeepSet

EPS = 1e-6


@dataclass(frozen=True)
class VCastPruner(Pruner):
    """Split the budget by how sharply the video turns, then keep each frame's outlying and strong tokens.

    V-CAST (arXiv 2603.27650), after the authors' released code, compressor/v_cast/modeling_qwen3_vl_v_cast.py of
    github.com/xinyouu/V-CAST. Only abstract and introduction of the paper were available to us, so no equation is
    cited.

    With r_t the normalized mean of frame t's tokens and v_t = r_t - r_(t-1), the curvature of a frame is c_t = 1 -
    cos(v_t, v_(t+1)), from 0 (straight on) to 2 (reversed); it is 1 for the first and the last frame, and where the
    video stands still. Every frame gets `least` tokens, and the share softmax(c / temperature) of the rest, up to all
    its tokens. Within a frame the tokens of highest (1 - cos(x, r_t)) + n are kept, where n is the length of x, scaled
    to 0..1 between the frame's shortest and longest. Ties go to the earlier token. Positions stay, and nothing is
    merged.

    Deviations: it acts on the drafter's context. The remainder of rounding down goes to the frames of largest
    fractions, one token each, in rounds; the code gives all of it to one frame until that is full, which is a fault.
    The budget is met exactly: the code takes at least `least` tokens per frame, and keeps a video of one frame whole;
    here a smaller budget is split without the minimum, and a single frame is ranked like others. Computed in float32 or
    wider; the code uses the model's dtype.

    Signals: features. Cost: O(N D), a slice of frames at a time, and one copy of F numbers to the host. Limits: newline
    tokens come last; each video of a prompt is treated on its own.

    Attributes:
        temperature: Of the softmax over frames, above 0. Low values favour frames where the video turns.
        least: Fewest tokens per frame.

    Raises:
        UserError: The temperature is not positive, or `least` is below 0.
    """

    name = "vcast"
    paper = "V-CAST (arXiv 2603.27650)"
    fidelity = "adapted"
    needs = frozenset({"features"})
    temperature: float = 0.7
    least: int = 1

    def __post_init__(self) -> None:
        check_range("vcast: temperature", self.temperature, 1e-3)
        check_range("vcast: least", self.least, 0)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,) = ctx.by_frame(ctx.features)
        mean_FD, score_FP = looks(x_FPD)
        share_F = self.shares(curvature(mean_FD).tolist(), ctx.budget, x_FPD.shape[1])
        order_FP = score_FP.sort(dim=1, descending=True, stable=True).indices
        kept_FP = order_FP.argsort(dim=1) < torch.tensor(share_F, device=x_FPD.device)[:, None]
        return KeepSet(kept_FP.flatten().nonzero().flatten(), ctx.total)

    def shares(self, curvature_F: list[float], budget: int, per_frame: int) -> list[int]:
        """Return the number of tokens to keep of each frame. They sum to `budget`, which is at most all tokens."""
        least = min(self.least, per_frame)
        least = least if budget >= least * len(curvature_F) else 0
        room, rest = per_frame - least, budget - least * len(curvature_F)
        weights = [math.exp((c - max(curvature_F)) / self.temperature) for c in curvature_F]
        wanted = [weight / math.fsum(weights) * rest for weight in weights]
        share_F = [min(math.floor(part), room) for part in wanted]
        order = sorted(range(len(wanted)), key=lambda frame: (math.floor(wanted[frame]) - wanted[frame], frame))
        left = rest - sum(share_F)
        while left:
            for frame in [frame for frame in order if share_F[frame] < room][:left]:
                share_F[frame] += 1
                left -= 1
        return [least + share for share in share_F]


def looks(x_FPD: Tensor) -> tuple[Tensor, Tensor]:
    """(F, D) normalized mean of each frame, and (F, P) score of each token: its distance to the mean plus its norm."""
    wide = torch.promote_types(x_FPD.dtype, torch.float32)
    means, scores = [], []
    for part in x_FPD.split(max(1, at_once(x_FPD.device) // max(x_FPD[:1].numel(), 1))):
        x = part.to(wide)
        mean_FD = normalize(x.mean(1), dim=-1, eps=EPS)
        outlier_FP = 1 - cosine_similarity(x, mean_FD[:, None], dim=-1, eps=EPS)
        length_FP = x.norm(dim=-1)
        low_F1, high_F1 = length_FP.amin(1, keepdim=True), length_FP.amax(1, keepdim=True)
        means.append(mean_FD)
        scores.append(outlier_FP + (length_FP - low_F1) / (high_F1 - low_F1 + EPS))
    return torch.cat(means), torch.cat(scores)


def curvature(mean_FD: Tensor) -> Tensor:
    """(F,) 1 - cosine between a frame's step in and its step out; 1 at both ends and where a step is 0."""
    step_ED = mean_FD.diff(dim=0)
    turn = torch.ones_like(mean_FD[:, 0])
    if len(mean_FD) > 2:
        turn[1:-1] = 1 - cosine_similarity(step_ED[:-1], step_ED[1:], dim=-1, eps=EPS)
    return turn


@hookimpl
def specvlm_strategies() -> list[type]:
    return [VCastPruner]
