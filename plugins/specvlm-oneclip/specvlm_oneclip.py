"""OneClip-RAG: cut the video into clips around the peaks of its relevance, and keep frames of the best clips.

Symbols and shape suffixes: B budget, N video tokens, F frames, R runs of neighbouring clips, P tokens of one frame.
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
    """Keep whole frames of the clips that the question is about. OneClip-RAG (arXiv 2512.08410).

    s_f is the target's attention to frame f, summed over its tokens. The height of a frame is g_f = 2 s_f - (lowest s
    reached going left while s does not rise) - (the same to the right). The ceil(F / clip) frames of greatest height
    are centres. Between two centres, the earlier clip ends with the lowest frame (the earlier one on a tie), or with
    its centre if the two are neighbours. A clip scores the maximum of its s. The best `clips` are taken, and those that
    touch are joined to runs. Of n frames, a run of c clips gets n c / (all clips taken), evenly spaced from its first
    frame to its last. The budget holds floor(B / P) whole frames; the rest of it thins out the remaining frame of
    highest s, evenly.

    Deviations: in the paper, s is the softmax of a retriever's image-question logits; the target's attention needs no
    other model. Frames are those that the target saw; the released code reads the file again between the ends of a run.
    If a run is too short for its share, the others take it, and when all are used up, the next best clips follow. At
    most as many clips are taken as frames fit. A single frame is its run's highest; the released code shows none, or
    the run's first, a minimum. Shares are rounded to add up to n; the code rounds all down. A run ends with its own
    last frame; in the code, with the first frame of the next clip.

    Signals: verifier_attention. Cost: N, and a loop over F numbers on the host. Limits: the drafter sees nothing of
    other frames, so a budget of a few frames covers a few moments; with two frames per run these are its ends, which
    are the least relevant.

    Attributes:
        clip: Mean frames per clip; the paper's 10 s at one frame per second.
        clips: Number of clips taken; 16 as released.
        centres: Candidates for centres: `all` frames as released, or `peaks` (ours), only local maxima.
        shares: How frames are split among runs: `clips` as released, or `length` (ours), where clips are not joined,
            each gets one frame, the others go by length, and frames are in the middle of equal parts.

    Raises:
        UserError: A field is out of range.
        ValueError: The attention contains NaN.
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
        """Choose `count` frames of the best clips."""
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
        """Cut the video into clips, each as (first frame, last frame + 1)."""
        heights = {f: height(relevance, f) for f in range(len(relevance)) if self.centres == "all" or is_peak(relevance, f)}
        centres = sorted(sorted(heights, key=lambda f: -heights[f])[: math.ceil(len(relevance) / self.clip)])
        ends = [boundary(relevance, left, right) + 1 for left, right in pairwise(centres)]
        return list(pairwise([0, *ends, len(relevance)]))

    def shared(self, runs: list[tuple[int, int]], joined: list[int], count: int) -> list[int]:
        """Split `count` frames among the runs; all frames if there are fewer."""
        length_R, clips_R = torch.tensor([stop - start for start, stop in runs]), torch.tensor(joined)
        count = min(count, int(length_R.sum()))
        if self.shares == "length":
            return (1 + apportion(count - len(runs), length_R - 1)).tolist()
        share_R = torch.zeros_like(length_R)
        while left := count - int(share_R.sum()):
            share_R = (share_R + apportion(left, clips_R * (share_R < length_R))).minimum(length_R)
        return share_R.tolist()


def height(relevance: list[float], frame: int) -> float:
    """How far the relevance of a frame rises above the lows on either side."""
    return 2 * relevance[frame] - lowest(relevance[frame::-1]) - lowest(relevance[frame:])


def is_peak(relevance: list[float], frame: int) -> bool:
    """True for a local maximum, or the first frame of a plateau. Every video has one."""
    value = relevance[frame]
    after = next((later for later in relevance[frame:] if later != value), -math.inf)
    before = relevance[frame - 1] if frame else -math.inf
    return before < value and after < value


def lowest(way: list[float]) -> float:
    """Return the lowest value before a sequence first rises."""
    low = way[0]
    for value in way[1:]:
        if value > low:
            break
        low = value
    return low


def boundary(relevance: list[float], left: int, right: int) -> int:
    """Return the last frame of the clip around `left`: the lowest one between both centres, the earlier on a tie."""
    return min(range(left + 1, right), key=lambda f: relevance[f], default=left)


def join(clips: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Join clips that touch to runs, in order of time. Returns the runs, and the number of clips in each."""
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
