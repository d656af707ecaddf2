"""FastVID: keep salient tokens of every frame, and anchors that gather the other tokens of a segment.

Symbols and shape suffixes: B budget, N video tokens of one video, F frames, P tokens of one frame, G anchor frames, C
anchors of an anchor frame, T tokens that anchors gather, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.errors import check_choice, check_range
from specvlm.strategies import PruneContext, Pruner, token_signals
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.cluster import cluster
from specvlm.toolkit.segments import adjacent_cosine, cuts, spans, written
from specvlm.types import KeepSet


@dataclass(frozen=True)
class FastVidPruner(Pruner):
    """Keep salient tokens, and per segment a few dense anchors that gather the rest. FastVID (arXiv 2503.11187).

    Segments are cut at the `segments` - 1 least similar neighbouring frames (by mean features), and wherever the cosine
    is below `segment`. Of a frame's share r = floor(B / F), s = r - floor(d r) are its most salient tokens. The other r
    - s, times the length of the segment, go to its anchor frames, every p-th counted back from the last, in equal whole
    parts: the tokens of best DPC-kNN score (k = 4) among those not salient. Every other token of the segment goes to
    its most similar anchor in each anchor frame: anchor := w anchor + (1 - w) mean(gathered), w = max(1 / (count + 1),
    beta). Positions stay. The defaults are the paper's for LLaVA-OneVision; it has segment=0.84 for Qwen2.5-VL.

    Deviations: what rounding leaves of B goes to the most salient tokens left, in any frame; the paper keeps fewer. The
    frame vector is the mean of a frame's tokens (the paper's fallback for its pooling head, which the targets lack). Of
    equal densities the earlier token counts as denser; the code adds noise. The code's deduplication above 0.95 for
    Qwen is left out. In the code an anchor is itself gathered, by itself and by the anchors of other frames, so that it
    counts twice; the paper's text suggests that only other tokens are, which is the default (gather_anchors=False). The
    saliency is the attention in the last layer of the vision encoder, as in the paper for Qwen2.5-VL; for SigLIP the
    paper uses that of the pooling head.

    Signals: features and the saliency. Cost: a product of N D by a segment's anchors, and one of G P^2 D; a loop over
    segments. Limits: with fewer than one token per frame only the saliency counts.

    Attributes:
        segments: Fewest segments.
        segment: Cosine of neighbouring frames below which a segment is cut.
        d: Share of a frame's tokens that goes to the anchors, 0 to 1.
        p: Distance of anchor frames.
        beta: Least weight of an anchor in its mean, 0 to 1.
        gather_anchors: True does as the code does.
        saliency: A signal of one number per token. verifier_attention (ours) is the target's: on the embedded pairs as
            many guesses are accepted with it, or clearly more (experiments/strategies).

    Raises:
        UserError: A field is out of range.
        ValueError: The saliency contains NaN.
    """

    name = "fastvid"
    paper = "FastVID (arXiv 2503.11187)"
    fidelity = "adapted"
    segments: int = 8
    segment: float = 0.9
    d: float = 0.4
    p: int = 4
    beta: float = 0.6
    gather_anchors: bool = False
    saliency: str = "vision_attention"

    def __post_init__(self) -> None:
        check_range("fastvid: d", self.d, 0, 1)
        check_range("fastvid: beta", self.beta, 0, 1)
        check_range("fastvid: p", self.p, 1)
        check_choice("fastvid: saliency", self.saliency, token_signals())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features", self.saliency})

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (x_FPD,), saliency_N = ctx.by_frame(ctx.features.float()), ctx.scores(self.saliency)
        frames, per_frame, _ = x_FPD.shape
        salient, context = self.shares(ctx.budget // frames)
        kept_N = torch.zeros_like(saliency_N, dtype=torch.bool)
        order_FP = saliency_N.view(frames, per_frame).sort(dim=1, descending=True, stable=True).indices
        kept_N.view(frames, per_frame).scatter_(1, order_FP[:, :salient], True)
        segments = spans(cuts(adjacent_cosine(x_FPD.mean(1)), self.segment, self.segments))
        anchors = [self.anchors(start, stop, context, per_frame - salient) for start, stop in segments]
        anchor_N = self.centres(x_FPD, kept_N, anchors)

        left_N = saliency_N.masked_fill(kept_N | anchor_N, float("-inf"))
        spare = ctx.budget - int((kept_N | anchor_N).sum())
        kept_N[left_N.sort(descending=True, stable=True).indices[:spare]] = True

        own_K = (kept_N | anchor_N).nonzero().flatten()
        owner, source, weight = [own_K], [own_K], [torch.ones_like(own_K, dtype=torch.float32)]
        unit_ND = normalize(x_FPD.flatten(0, 1), dim=-1)
        rest_N = ~kept_N if self.gather_anchors else ~(kept_N | anchor_N)
        for (start, stop), (anchor_frames, _) in zip(segments, anchors, strict=True):
            rest_T = rest_N[start * per_frame : stop * per_frame].nonzero().flatten() + start * per_frame
            for frame in anchor_frames:
                place = frame * per_frame
                anchor_C = anchor_N[place : place + per_frame].nonzero().flatten() + place
                if len(anchor_C) and len(rest_T):
                    nearest_T = (unit_ND[rest_T] @ unit_ND[anchor_C].T).argmax(1)
                    owner.append(anchor_C[nearest_T])
                    source.append(rest_T)
                    weight.append(self.gathered(torch.bincount(nearest_T, minlength=len(anchor_C)))[nearest_T])
        return KeepSet.merge(torch.cat(owner), torch.cat(source), torch.cat(weight), ctx.total)

    def shares(self, share: int) -> tuple[int, int]:
        """Split a frame's share into salient tokens and tokens for the anchor frames."""
        context = math.floor(written(self.d) * share)
        return share - context, context

    def anchors(self, start: int, stop: int, context: int, most: int) -> tuple[list[int], int]:
        """Return the anchor frames of a segment, and the number of anchors in each."""
        frames = list(range(stop - 1, start - 1, -self.p))[::-1]
        return frames, min(context * (stop - start) // len(frames), most)

    def centres(self, x_FPD: Tensor, kept_N: Tensor, anchors: list[tuple[list[int], int]]) -> Tensor:
        """(N,) bool: True for the anchors of all segments."""
        device = x_FPD.device
        frame_G = torch.tensor([frame for frames, _ in anchors for frame in frames], device=device)
        count_G = torch.tensor([count for frames, count in anchors for _ in frames], device=device)
        free_FP = ~kept_N.view(x_FPD.shape[:2])
        centre_FP = torch.zeros_like(free_FP)
        centre_FP[frame_G] = cluster(x_FPD[frame_G], count_G, k=4, mask_GP=free_FP[frame_G])[0]
        return centre_FP.flatten()

    def gathered(self, count_C: Tensor) -> Tensor:
        """Weight of one gathered token relative to its anchor: (1 - w) / (w count)."""
        own_C = (1 / (count_C + 1.0)).clamp(min=self.beta)
        return (1 - own_C) / (own_C * count_C.clamp(min=1))


@hookimpl
def specvlm_strategies() -> list[type]:
    return [FastVidPruner]
