"""Keep the video tokens that the target attends to most."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class VerifierAttentionPruner(Pruner):
    """Keep the B tokens of highest a_j, the target's attention from the text after the video to video token j.

    B is the budget; a_j is the mean over layers, heads and text tokens. This is SpecVLM's Stage I alone (arXiv
    2508.16201, "attention only"), which then takes the whole budget instead of a share of the attention. Ties go to the
    earlier token.

    Deviations: none.

    Cost: a sort of N; the signal is a by-product of the target's prefill. Limits: attention is long-tailed and
    concentrates on few frames, so the drafter may not see the others at all.

    Raises:
        ValueError: The attention contains NaN.
    """

    name = "verifier_attention"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    needs = frozenset({"verifier_attention"})

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet.top(ctx.verifier_attention, ctx.budget)
