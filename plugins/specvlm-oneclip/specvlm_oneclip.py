"""OneClip-RAG: cut the video into clips round the peaks of its relevance, and show the drafter frames of the best clips.

Shape suffixes: F frames, R runs of neighbouring clips, P tokens of one frame.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from specvlm.errors import check_choice, check_range
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.plugins import hookimpl
from specvlm.toolkit.segments import apportion, spread
from specvlm.types import KeepSet

CENTRES, SHARES = ("all", "peaks"), ("clips", "length")


@dataclass(frozen=True)
class OneClipPruner(Pruner):
    """Show the drafter whole frames, of the clips that the question is about. OneClip-RAG (arXiv 2512.08410).

    s_f = the target's attention to frame f, summed over its tokens. The height of a frame is g_f = 2 s_f - (lowest s
    reached going left while s does not rise) - (the same, right). The ceil(F / clip) frames of greatest height are centres.
    Between two centres the lowest frame, the earlier of equals, ends the earlier clip; of two that are neighbours the first
    does. A clip scores the maximum of its s; the best `clips` are taken, and those that touch are joined to runs. Of n
    frames a run of c clips gets n c / (all clips taken), at even distances from its first frame to its last. B / P frames
    fit the budget whole; the rest of it thins out, evenly, the frame of highest s that is left.

    clip: frames a clip spans on average; the paper's 10 s at one frame a second. clips: 16, as released. centres: of which
    frames. `all` as released; `peaks`, local maxima only, is ours. shares: `clips` as released. `length` is ours: clips are
    not joined, each gets one frame, the others go by the clips' lengths, and stand in the middles of as many equal parts.

    Deviations: s is the softmax of a retriever's image-question logits there; the target's attention needs no other model.
    Frames are those that the target saw, where the released code reads the file again between a run's ends: what a short
    run cannot take the others share, and when all are used up the next best clips follow. No more clips are taken than
    frames fit, and one frame alone is its run's highest, where the released code shows none or the run's first, a minimum.
    Shares are rounded to add up to n; there all are rounded down. A run ends with its own last frame, there with the next
    clip's first.

    Signals: verifier_attention. Cost: N, and a loop over F numbers on the host. Limits: of frames that are not taken the
    drafter sees nothing, so with a budget of a few frames it knows a few moments; two frames of a run are its ends, which
    are the least relevant. Raises UserError for fields out of range; ValueError where the attention holds NaN.
    """

    name = "oneclip"
    paper = "OneClip-RAG (arXiv 2512.08410)"
    fidelity = "adapted"
    needs = frozenset({"verifier_attention"})
    clip: int = 10
    clips: int = 16
    centres: str = "all"
    shares: str = "clips"

    def __post_init__(self) -> None:
        check_range("oneclip: clip", self.clip, 1)
        check_range("oneclip: clips", self.clips, 1)
        check_choice("oneclip: centres", self.centres, CENTRES)
        check_choice("oneclip: shares", self.shares, SHARES)

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
        clips = self.cut(relevance)
        order = sorted(range(len(clips)), key=lambda c: -max(relevance[slice(*clips[c])]))
        taken: set[int] = set()
        while left := count - len(taken):
            best, order = order[: min(self.clips, left)], order[min(self.clips, left) :]
            chosen = [clips[c] for c in sorted(best)]
            runs, joined = join(chosen) if self.shares == "clips" else (chosen, [1] * len(chosen))
            for (start, stop), share in zip(runs, self.shared(runs, joined, left), strict=True):
                if share == 1:
                    taken.add(max(range(start, stop), key=lambda f: relevance[f]))
                elif self.shares == "clips":
                    taken |= {start + f for f in KeepSet.uniform(stop - start, share).index.tolist()}
                else:
                    taken |= {start + f for f in spread(stop - start, share).tolist()}
        return taken

    def cut(self, relevance: list[float]) -> list[tuple[int, int]]:
        """First frame of each clip, and one past its last."""
        heights = {f: height(relevance, f) for f in range(len(relevance)) if self.centres == "all" or is_peak(relevance, f)}
        centres = sorted(sorted(heights, key=lambda f: -heights[f])[: math.ceil(len(relevance) / self.clip)])
        ends = [boundary(relevance, left, right) + 1 for left, right in pairwise(centres)]
        return list(pairwise([0, *ends, len(relevance)]))

    def shared(self, runs: list[tuple[int, int]], joined: list[int], count: int) -> list[int]:
        """Frames of each run: `count`, or all that there are."""
        length_R, clips_R = torch.tensor([stop - start for start, stop in runs]), torch.tensor(joined)
        count = min(count, int(length_R.sum()))
        if self.shares == "length":
            return (1 + apportion(count - len(runs), length_R - 1)).tolist()
        share_R = torch.zeros_like(length_R)
        while left := count - int(share_R.sum()):
            share_R = (share_R + apportion(left, clips_R * (share_R < length_R))).minimum(length_R)
        return share_R.tolist()


def height(relevance: list[float], frame: int) -> float:
    """How far a frame stands above what lies on either side of it."""
    return 2 * relevance[frame] - lowest(relevance[frame::-1]) - lowest(relevance[frame:])


def is_peak(relevance: list[float], frame: int) -> bool:
    """Whether it is a local maximum; of a plateau its first frame. There is always one."""
    value = relevance[frame]
    after = next((later for later in relevance[frame:] if later != value), -math.inf)
    before = relevance[frame - 1] if frame else -math.inf
    return before < value and after < value


def lowest(way: list[float]) -> float:
    """The value reached along a way while it does not rise."""
    low = way[0]
    for value in way[1:]:
        if value > low:
            break
        low = value
    return low


def boundary(relevance: list[float], left: int, right: int) -> int:
    """The last frame of the clip of the centre `left`, before that of `right`: the lowest between, the earlier of equals."""
    return min(range(left + 1, right), key=lambda f: relevance[f], default=left)


def join(clips: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Runs of clips that touch, and how many each has. In order of time."""
    runs, joined = clips[:1], [1]
    for start, stop in clips[1:]:
        if start == runs[-1][1]:
            runs[-1], joined[-1] = (runs[-1][0], stop), joined[-1] + 1
        else:
            runs.append((start, stop))
            joined.append(1)
    return runs, joined


@hookimpl
def specvlm_strategies() -> list[type]:
    return [OneClipPruner]
