"""A benchmark drafter that does all the work of a real one, then guesses right by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experiments.gpu_pair.drafter import GivenDrafter, GivenSession, guesses
from specvlm.models.passes import Work, driven
from specvlm.strategies import DraftContext, DraftSession
from specvlm.types import DraftTree, Verdict


@dataclass(frozen=True)
class ChanceDrafter(GivenDrafter):
    """Drafts with `inner`, then makes the best guess of each depth right with probability `chance`, up to the first wrong.

    Random numbers come from the request's seed, one row per round: requests are accepted independently of each other.

    Attributes:
        chance: Probability that a guess is right, given that those above it are.
    """

    name = "chance"
    chance: float = 0.8

    def start(self, ctx: DraftContext) -> DraftSession:
        return ChanceSession(self, ctx)


class ChanceSession(GivenSession):
    """Session that draws how many guesses are right, anew in each round."""

    def __init__(self, drafter: ChanceDrafter, ctx: DraftContext) -> None:
        super().__init__(drafter, ctx)
        self.chance, self.depth, self.generator = drafter.chance, drafter.tree.depth, ctx.generator
        self.tables = tables_of(drafter, self.known, ctx.vocabulary, ctx.target.device)

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        if last is not None:
            self._follow(last)
        tree = yield from driven(self.inner.propose(last))
        if self.position < len(self.known):
            right = (torch.rand(self.depth, generator=self.generator) < self.chance).tolist()
            many = right.index(False) if False in right else self.depth
            tree.tokens[1:] = self.tables[many][self.position]
        return tree


def tables_of(drafter: ChanceDrafter, known: Sequence[int], vocabulary: int, device: torch.device) -> dict[int, torch.Tensor]:
    """Make the guesses of every number of accepted tokens (see `gpu_pair.drafter.guesses`)."""
    return {many: guesses(drafter.tree, known, many, vocabulary).to(device) for many in range(drafter.tree.depth + 1)}
