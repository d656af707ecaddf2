"""A drafter that knows the target's answer beforehand, and its next best tokens: it costs nothing and is mostly right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specvlm.strategies import DraftContext, Drafter, DraftSession, VerifyContext
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, TreeShape, Verdict

CHOICES = 3


@dataclass(frozen=True)
class Listening(GreedyVerifier):
    """The greedy rule, which writes down the best tokens at every place of the target's own answer."""

    choices: list[list[int]] = field(default_factory=list)

    def decide(self, ctx: VerifyContext) -> Tensor:
        self.choices.append(ctx.logits_MV[0].topk(CHOICES).indices.tolist())
        return super().decide(ctx)


@dataclass(frozen=True)
class KnowingDrafter(Drafter):
    """choices: of every place of the answer its best tokens, best first. Now and then the second stands first in the tree, so
    that what is accepted does not lie in neighbouring rows.
    """

    name = "knowing"
    model = None
    shape: str = "paper"
    choices: Sequence[Sequence[int]] = ()
    seed: int = 0

    @property
    def max_nodes(self) -> int:
        return len(TreeShape.parse(self.shape))

    def start(self, ctx: DraftContext) -> DraftSession:
        return KnowingSession(self, ctx.bonus)


class KnowingSession(DraftSession):
    def __init__(self, drafter: KnowingDrafter, bonus: int) -> None:
        self.shape, self.choices = TreeShape.parse(drafter.shape), drafter.choices
        self.chance, self.done, self.root = random.Random(drafter.seed), 1, bonus

    def propose(self, last: Verdict | None) -> DraftTree:
        if last is not None:
            self.done, self.root = self.done + len(last.path), last.bonus
        swapped = {node for node in range(len(self.shape)) if self.chance.random() < 0.3}
        tokens = [self.root] + [self._guess(node, self.shape.parents[node] in swapped) for node in range(1, len(self.shape))]
        return DraftTree(torch.tensor(tokens), self.shape.parents)

    def _guess(self, node: int, swapped: bool) -> int:
        known = self.choices[min(self.done + self.shape.depths[node] - 1, len(self.choices) - 1)]
        rank = self.shape.ranks[node]
        rank = 1 - rank if swapped and rank < 2 and len(self.shape.children[self.shape.parents[node]]) > 1 else rank
        return known[rank % CHOICES] if rank < CHOICES else rank
