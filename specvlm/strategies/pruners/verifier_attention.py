"""Keep the video tokens the target attends to most."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class VerifierAttentionPruner(Pruner):
    """Keep the B tokens of highest a_j, the target's attention from the text after the video to video token j.

    a_j is the mean over layers, heads and text rows. SpecVLM's Stage I alone (arXiv 2508.16201, "attention only"),
    with the whole budget instead of a share of the attention. Among equal scores the earlier token is kept.

    Deviations: none.

    Cost: a sort of N; the signal comes out of the target's prefill. Limits: attention is long-tailed and gathers in a
    few frames, so others may go unseen. Raises ValueError where the attention holds NaN.
    """

    name = "verifier_attention"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    needs = frozenset({"verifier_attention"})

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.top(ctx.verifier_attention, ctx.budget)
