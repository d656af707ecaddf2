"""Self-speculation: the target drafts for itself from the pruned prompt (SpecVLM's "Self-SD")."""

from __future__ import annotations

from dataclasses import dataclass

from specvlm.strategies.drafters.tree import TreeDrafter


@dataclass(frozen=True)
class SelfDrafter(TreeDrafter):
    """Like `tree`, with the target as draft model: video features are shared, only a second, pruned cache is added.

    SpecVLM (arXiv 2508.16201), its Self-SD setting. Deviations: none.

    Cost: as for `tree`, but the draft passes and the prefill of the pruned prompt run the target. At batch 1 a draft
    pass reads the same weights as a target pass, so this rarely pays. No second checkpoint is needed.
    """

    name = "self"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    model = "target"
