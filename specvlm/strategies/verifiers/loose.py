"""Accept guesses that differ from the target's choice if they are unrelated to the video. Lossy (LVSpec).

Shape suffixes: M tree nodes, N video tokens, D width of the target.
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

ROWS = 4096  # video states converted to float32 at a time


@dataclass(frozen=True)
class LooseVerifier(Verifier):
    """Visual anchors must match the target's argmax; other guesses need not. The output is NOT the target's own.

    Each guess has a score A for how related to the video it is. Its last hidden state in the target's check is compared
    with those of the video tokens in the prefill; A is the mean of the `nearest` largest cosine similarities. Of a
    tree's guesses, the share `relaxed` with the lowest A is relaxed (rounded down; ties go to the earlier guess). The
    others are anchors.

    From the root down, the path takes the child that equals the target's argmax, if there is one. Otherwise it takes
    the first child (the drafter's best) if that is relaxed, or if its token is among the target's argmaxes within
    `window` positions on its path. Otherwise the path ends, and the argmax follows it. With relaxed = 0 and window = 0,
    every guess must match, as in `greedy`. As with every lossy verifier, the loop decides where an answer ends: a stop
    id is accepted exactly where the target chooses one.

    LVSpec (arXiv 2604.05650): anchors by A, relaxed = 0.7 (its λ), nearest = 10 (its N), the position-shift tolerance.
    Deviations: stop ids must match, since they would be accepted as filler and cut answers short. The paper leaves
    these open, as far as we can tell: λ is the share of one round's guesses (a running quantile would be state, and a
    verdict is a pure function of its context), the hidden states are the last layer's, the row is the guess's own,
    window = 2, and the rule for trees (the paper drafts chains of 10: use drafter.shape=chain:10).

    Limits: `lossless = False`, so a run's verdict is `lossy`; do not put its figures in a table with those of lossless
    verifiers. Negations and logical words score as unrelated to the video, so they need not match: do not use this
    verifier where they matter. For prompts without a video, no guess is relaxed, and only `window` has an effect.
    Cost: (N, D) hidden states per request; per round M x N x D operations and a read of (M,) scores on the host. Checks
    are not captured.

    Attributes:
        relaxed: Share of guesses that need not match, 0 to 1.
        nearest: Number of largest similarities that the score is the mean of.
        window: Number of positions by which a guess may be shifted against the target's choice; 0 is off.

    Raises:
        ValueError: Unless 0 <= relaxed <= 1, nearest >= 1 and window >= 0.
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
        """Follow the path from the root as far as guesses match or need not, and end it with the target's argmax."""
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
        """Return the nodes of the guesses that need not match: those least related to the video."""
        count = math.floor(written(self.relaxed) * (len(ctx.tree) - 1))
        if not count or ctx.hidden_MD is None or ctx.video_ND is None:
            return set()
        scores_M = visual_scores(ctx.hidden_MD, ctx.video_ND, self.nearest)[1:]
        return set((scores_M.sort(stable=True).indices[:count] + 1).tolist())

    def _around(self, path: list[int], child: int, below: list[list[int]], best: list[int]) -> set[int]:
        """Return the target's choices within `window` positions of the child, above it and down its first children."""
        line = [*path, child]
        while len(line) < len(path) + self.window and below[line[-1]]:
            line.append(below[line[-1]][0])
        at = len(path) - 1  # index of the node whose logits choose the child's token
        return {best[node] for node in line[max(0, at - self.window) : at + self.window + 1]} if self.window else set()


def visual_scores(hidden_MD: Tensor, video_ND: Tensor, nearest: int) -> Tensor:
    """Return (M,) means of the `nearest` largest cosine similarities to the video states, which have unit length."""
    unit_MD = normalize(hidden_MD.float(), dim=-1)
    cosines_MN = torch.cat([unit_MD @ piece.to(unit_MD).mT for piece in video_ND.split(ROWS)], 1)
    return cosines_MN.topk(min(nearest, cosines_MN.shape[1])).values.mean(-1)
