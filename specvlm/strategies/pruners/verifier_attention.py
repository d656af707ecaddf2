"""Keep the video tokens that the target attends to most."""

from dataclasses import dataclass

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class VerifierAttentionPruner(Pruner):
    """Keep the video tokens that the text after the video attends to most, in the target.

    Keeps as many as the budget allows, by their attention averaged over layers, heads and text tokens. Ties go to the
    earlier token. This is Stage I of SpecVLM alone (arXiv 2508.16201, "attention only"). In `two_stage`, Stage I stops
    at a share of the attention; here it fills the whole budget.

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
