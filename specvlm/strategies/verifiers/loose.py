"""Accept what the target would not have written, where the text says little about the video. Lossy (LVSpec).

Shape suffixes: M tree nodes, N video tokens, D width.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specvlm.strategies import Verifier, VerifyContext
from specvlm.toolkit.segments import written
from specvlm.types import Verdict, Within, children_of

ROWS = 4096  # of the video's states widened to float32 at once


@dataclass(frozen=True)
class LooseVerifier(Verifier):
    """Visual anchors must match the target's argmax; other guesses pass as they are. The output is NOT the target's own.

    As under every lossy rule, the loop decides where an answer ends: a guess that is a stop id passes only where the target
    would have written it, and no other guess passes where the target would have written a stop id.

    From the root on: the child that equals the target's argmax, if there is one; otherwise the first child (the drafter's
    best), if it is no anchor, or if its token is among the target's argmaxes within `window` positions of its own on its way;
    else the end, and the bonus is the argmax. A guess's score A is the mean of the `nearest` largest cosines between its last
    hidden state in the target's check and those of the video tokens in the prefill. Of a tree's guesses the share `relaxed`
    with the lowest A (rounded down; equal ones: the earlier) is relaxed, the others are anchors. relaxed = 0 and window = 0
    are strict.

    LVSpec (arXiv 2604.05650): anchors by A, relaxed = 0.7 (its λ), nearest = 10 (its N), the position-shift tolerance.
    Deviations: strict stop ids, since a stop id passes for a filler else and answers are cut off. Where we found no word on it,
    ours are: that λ is the share of the guesses of one round (a running quantile would be state, and a verdict is a pure
    function of its context), which layer (the last), which row (the guess's own), window = 2, and what holds on trees (the
    paper drafts chains of 10: use drafter.shape=chain:10).

    `lossless = False`: a run's verdict is `lossy`, and its figures belong in no table with those of lossless rules. Negations
    and words of logic score as irrelevant to the video, and pass: do not use it where they matter. Under prompts without a
    video nothing is relaxed but the window. Cost: (N, D) hidden states of a request; M x N x D a round and a read of (M,)
    scores on the host; checks are not captured. ValueError unless 0 <= relaxed <= 1, nearest >= 1 and window >= 0.
    """

    name = "loose"
    paper = "LVSpec (arXiv 2604.05650)"
    fidelity = "adapted"
    lossless = False
    reads_hidden = True

    relaxed: Annotated[float, Within(0, 1)] = 0.7
    nearest: Annotated[int, Within(1, 100_000)] = 10
    window: Annotated[int, Within(0, 1000)] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.relaxed <= 1:
            raise ValueError(
                f"relaxed must lie within 0..1, got {self.relaxed}: it is the share of guesses that need not match"
            )
        if self.nearest < 1 or self.window < 0:
            raise ValueError(f"nearest must be at least 1 and window at least 0, got {self.nearest} and {self.window}")

    def verify(self, ctx: VerifyContext) -> Verdict:
        tree, best = ctx.tree, ctx.logits_MV.argmax(-1).tolist()
        tokens, loose = tree.tokens.tolist(), self._relaxed(ctx)
        path, below = [0], children_of(tree.parents)
        while children := below[path[-1]]:
            exact = next((child for child in children if tokens[child] == best[path[-1]]), None)
            first = children[0]
            shifted = exact is None and tokens[first] in self._around(path, first, below, best)
            if exact is None and first not in loose and not shifted:
                break
            path.append(first if exact is None else exact)
        return Verdict(tuple(path), best[path[-1]])

    def _relaxed(self, ctx: VerifyContext) -> set[int]:
        """Guesses that need not match."""
        count = math.floor(written(self.relaxed) * (len(ctx.tree) - 1))
        if not count or ctx.hidden_MD is None or ctx.video_ND is None:
            return set()
        scores_M = visual_scores(ctx.hidden_MD, ctx.video_ND, self.nearest)[1:]
        return set((scores_M.sort(stable=True).indices[:count] + 1).tolist())

    def _around(self, path: list[int], child: int, below: list[list[int]], best: list[int]) -> set[int]:
        """The target's choices within `window` of the child's position: behind its way so far, down its first line."""
        line = [*path, child]
        while len(line) < len(path) + self.window and below[line[-1]]:
            line.append(below[line[-1]][0])
        at = len(path) - 1  # the row that chooses the child's position
        return {best[node] for node in line[max(0, at - self.window) : at + self.window + 1]} if self.window else set()


def visual_scores(hidden_MD: Tensor, video_ND: Tensor, nearest: int) -> Tensor:
    """(M,) mean of the largest cosines to the video. video: of unit length."""
    unit_MD = normalize(hidden_MD.float(), dim=-1)
    cosines_MN = torch.cat([unit_MD @ piece.to(unit_MD).mT for piece in video_ND.split(ROWS)], 1)
    return cosines_MN.topk(min(nearest, cosines_MN.shape[1])).values.mean(-1)
