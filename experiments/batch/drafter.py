"""A benchmark drafter that does all the work of a real one, then guesses right by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from experiments.gpu_pair.drafter import GivenDrafter, GivenSession, guesses_on
from specvlm.models.passes import Work, driven
from specvlm.strategies import DraftContext, DraftSession
from specvlm.strategies.drafters.shapes import ROOT, shapes_for
from specvlm.types import DraftTree, TreeShape, Verdict, children_of
from specvlm.types.chances import chance_of


@dataclass(frozen=True)
class ChanceDrafter(GivenDrafter):
    """Drafts with `inner`, then makes guesses right by chance, up to the first wrong.

    The best guess of a node is right with probability `chance`, given that those above it are; the guesses beside it share
    its misses (`chance_of`). Random numbers come from the request's seed, one row per round: requests are accepted
    independently of each other.

    Attributes:
        chance: Probability that a best guess is right.
    """

    name = "chance"
    chance: float = 0.8

    @property
    def tree(self) -> TreeShape:
        """The deepest tree that may be drafted."""
        return max(self.inner.shapes, key=lambda shape: shape.depth)

    @property
    def adapts(self) -> bool:
        return self.inner.adapts

    def start(self, ctx: DraftContext) -> DraftSession:
        return ChanceSession(self, ctx)


class ChanceSession(GivenSession):
    """Session that draws which guesses are right, anew in each round."""

    def __init__(self, drafter: ChanceDrafter, ctx: DraftContext) -> None:
        super().__init__(drafter, ctx)
        self.chance, self.depth, self.generator = drafter.chance, drafter.tree.depth, ctx.generator
        shapes = shapes_for(ctx.captured) if drafter.adapts else drafter.inner.shapes
        self.right = {
            shape.parents: tables_of(shape, self.known, ctx.vocabulary, ctx.target.device) for shape in shapes if shape != ROOT
        }

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        if last is not None:
            self._follow(last)
        tree = yield from driven(self.inner.propose(last))
        draws = torch.rand(self.depth, generator=self.generator).tolist()  # as many whatever the shape is
        if self.position < len(self.known) and len(tree) > 1:
            tree.tokens[1:] = self.right[tree.parents][lucky(tree, self.chance, draws)][self.position]
        return tree


def lucky(tree: DraftTree, chance: float, draws: Sequence[float]) -> int:
    """Return the last right node of a tree: the best guess is right with a chance, others as `chance_of` says."""
    node, below = 0, children_of(tree.parents)
    for draw in draws:
        ranks = {tree.ranks[child] if tree.ranks else at: child for at, child in enumerate(below[node])}
        ends = dict(zip(ranks, accumulate(chance_of(chance, rank) for rank in ranks), strict=True))
        found = next((rank for rank, end in ends.items() if draw < end), None)
        if found is None:
            break
        node = ranks[found]
    return node


@lru_cache(maxsize=64)
def tables_of(shape: TreeShape, known: tuple[int, ...], vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """Make the guesses for every last right node (see `gpu_pair.drafter.guesses_on`). Do not write to them.

    Takes 16 ms for the paper's tree: call it before a clock starts.
    """
    ways = (DraftTree(torch.empty(0), shape.parents).way_to(node) for node in range(len(shape)))
    return [guesses_on(shape, known, way, vocabulary).to(device) for way in ways]
