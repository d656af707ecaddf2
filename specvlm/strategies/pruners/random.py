"""Keep video tokens at random. Shape suffix: K kept video tokens."""

from dataclasses import dataclass

import torch

from specvlm.strategies import PruneContext, Pruner
from specvlm.types import KeepSet


@dataclass(frozen=True)
class RandomPruner(Pruner):
    """Keep a uniformly random subset, drawn without replacement: the baseline SD-Rand of SpecVLM (arXiv 2508.16201).

    The first B (the budget) of a random permutation are kept. The request's generator draws on the CPU, so that a seed
    gives the same tokens on every device.

    Deviations: none.

    Cost: O(N) on the CPU, no signal.

    Raises:
        ValueError: The context has no generator.
    """

    name = "random"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"

    def select(self, ctx: PruneContext) -> KeepSet:
        if ctx.generator is None:
            raise ValueError("the random pruner draws from the generator of the request, but the context has none")
        chosen_K = torch.randperm(ctx.total, generator=ctx.generator)[: ctx.budget].sort().values
        return KeepSet(chosen_K.to(ctx.device), ctx.total)
