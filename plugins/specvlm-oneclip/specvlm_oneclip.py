"""OneClip-RAG: cut the video into clips round the peaks of its relevance, and show the drafter frames of the best clips.

Shape suffixes: F frames, C clips, P tokens of one frame.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from specvlm.errors import check_range
from specvlm.plugins import hookimpl
from specvlm.segments import apportion
from specvlm.strategy import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class OneClipPruner(Pruner):
    """Show the drafter whole frames, of the clips that the question is about. OneClip-RAG (arXiv 2512.08410).

    s_f = the target's attention to frame f, summed over its tokens (the paper: a softmax of CLIP's image-question logits).
    A peak's height is g_f = 2 s_f - (lowest s reached going left while s does not rise) - (the same, right). The
    ceil(F / clip) highest peaks are centres; the boundary between two centres is the interior minimum of s (the earlier
    one of equals), which begins the later clip. A clip scores the maximum of its s; frames are taken of the best `clips`,
    in proportion to their length and at even distances, at least one each: one alone is the centre. B / P frames fit the
    budget whole; the rest of it thins out, evenly, the frame of highest s that is left.

    clip: frames a clip spans on average; the paper's 10 s at one frame a second. clips: 16, the paper's.
    Signals: verifier_attention. Cost: N, and a loop over F numbers on the host. Limits: of frames that are not taken the
    drafter sees nothing, so with a budget of a few frames it knows a few moments. Raises UserError for fields below 1;
    ValueError where the attention holds NaN.
    """

    name = "oneclip"
    needs = frozenset({"verifier_attention"})
    clip: int = 10
    clips: int = 16

    def __post_init__(self) -> None:
        check_range("oneclip: clip", self.clip, 1)
        check_range("oneclip: clips", self.clips, 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        return ctx.each_video(self.of_video)

    def of_video(self, ctx: PruneContext) -> KeepSet:
        (attention_FP,) = ctx.by_frame(ctx.scores("verifier_attention").double())
        relevance = attention_FP.sum(1).tolist()
        per_frame = attention_FP.shape[1]
        whole, rest = divmod(ctx.budget, per_frame)
        frames = self.frames(relevance, whole)
        frame_K = torch.tensor(sorted(frames), dtype=torch.int64, device=ctx.device)
        index = (frame_K[:, None] * per_frame + torch.arange(per_frame, device=ctx.device)).flatten()
        if rest:
            thin = max((f for f in range(len(relevance)) if f not in frames), key=lambda f: relevance[f])
            index = torch.cat([index, thin * per_frame + KeepSet.uniform(per_frame, rest, ctx.device).index])
        return KeepSet(index.sort().values, ctx.total)

    def frames(self, relevance: list[float], count: int) -> set[int]:
        """`count` frames of the best clips."""
        if count == 0:
            return set()
        starts, centres = self.chunks(relevance)
        spans = list(pairwise([*starts, len(relevance)]))
        best = sorted(range(len(spans)), key=lambda c: -max(relevance[slice(*spans[c])]))[: min(self.clips, count)]
        taken: set[int] = set()
        while len(taken) < count:
            free = [[f for f in range(*spans[c]) if f not in taken] for c in best]
            taken |= spread_over(free, [centres[c] for c in best], count - len(taken))
            best = [c for c in range(len(spans)) if c not in best]  # the best clips were too short: go on with the others
        return taken

    def chunks(self, relevance: list[float]) -> tuple[list[int], list[int]]:
        """First frame and centre of each clip."""
        heights = peaks(relevance)
        wanted = math.ceil(len(relevance) / self.clip)
        centres = sorted(sorted(heights, key=lambda f: -heights[f])[:wanted])
        starts = [0] + [boundary(relevance, left, right) for left, right in pairwise(centres)]
        return starts, centres


def peaks(relevance: list[float]) -> dict[int, float]:
    """Height of each local maximum; of a plateau its first frame. There is always one."""
    heights = {}
    for frame, value in enumerate(relevance):
        left = lowest(relevance[frame::-1])
        right = lowest(relevance[frame:])
        after = next((later for later in relevance[frame:] if later != value), -math.inf)
        before = relevance[frame - 1] if frame else -math.inf
        if before < value and after < value:
            heights[frame] = 2 * value - left - right
    return heights


def lowest(way: list[float]) -> float:
    """The value reached along a way while it does not rise."""
    low = way[0]
    for value in way[1:]:
        if value > low:
            break
        low = value
    return low


def boundary(relevance: list[float], left: int, right: int) -> int:
    """The frame of the interior minimum between two centres, the earlier of equals."""
    return min(range(left + 1, right), key=lambda f: relevance[f])


def spread_over(free: list[list[int]], centres: list[int], count: int) -> set[int]:
    """`count` frames (or all) of the clips in proportion to their lengths, one each first, at even distances."""
    free_C = torch.tensor([len(frames) for frames in free])
    count = min(count, int(free_C.sum()))
    first_C = (free_C > 0).long()
    if int(first_C.sum()) <= count:
        share_C = first_C + apportion(count - int(first_C.sum()), free_C - first_C)
    else:
        share_C = first_C * (first_C.cumsum(0) <= count)
    taken = set()
    for frames, centre, share in zip(free, centres, share_C.tolist(), strict=True):
        if share == 1 and centre in frames:
            taken.add(centre)
        else:
            taken |= {frames[(2 * i + 1) * len(frames) // (2 * share)] for i in range(share)}
    return taken


@hookimpl
def specvlm_strategies() -> list[type]:
    return [OneClipPruner]
