"""A benchmark drafter that does all the work of a real one, then guesses right at a given acceptance.

Models with random weights never agree, so acceptance is given and only time is measured.

Shape suffixes: T tokens of the known answer, M tree nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.passes import Work, driven
from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.types import DraftTree, TreeShape, Verdict


@dataclass(frozen=True)
class GivenDrafter(Drafter):
    """Drafts with `inner`, then replaces the first `accepted` guesses of one path by the target's own tokens.

    All other guesses are made wrong. After the end of `known`, and once the output has left it, no guess is right.

    Cost: one row of a table, copied over the tokens on the device. Limits: the drafter's cache holds keys and values of
    its own guesses, not of the accepted tokens; this changes no shape and thus no time.

    Attributes:
        inner: The real drafter.
        known: The target's answer to the same prompt, from an earlier run.
        accepted: Mean accepted tokens per round; 3.5 alternates between 3 and 4.

    Raises:
        UserError: If `accepted` exceeds the depth of the tree.
    """

    name = "given"
    inner: TreeDrafter = field(default_factory=TreeDrafter)
    known: tuple[int, ...] = ()
    accepted: float = 4.0

    def __post_init__(self) -> None:
        depth = self.tree.depth
        if not 0 <= self.accepted <= depth:
            raise UserError(f"accepted={self.accepted:g}: drafter.shape={self.inner.shape} can have 0 to {depth} accepted")

    @property
    def model(self) -> str:  # type: ignore[override]
        return str(self.inner.model)

    @property
    def tree(self) -> TreeShape:
        return TreeShape.parse(self.inner.shape)

    @property
    def max_nodes(self) -> int:
        return self.inner.max_nodes

    def start(self, ctx: DraftContext) -> DraftSession:
        return GivenSession(self, ctx)


class GivenSession(DraftSession):
    """Session that overwrites the real session's token tensor in place, so that it commits what was checked."""

    def __init__(self, drafter: GivenDrafter, ctx: DraftContext) -> None:
        self.inner = drafter.inner.start(ctx)
        self.known, self.accepted, self.rounds = drafter.known, drafter.accepted, 0
        self.position = 0 if self.known and self.known[0] == ctx.bonus else len(self.known)  # of the root in `known`
        low = int(drafter.accepted)
        self.tables = {many: guesses(drafter.tree, self.known, many, ctx.vocabulary) for many in (low, low + 1)}
        self.guessed: Tensor | None = None

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        if last is not None:
            self._follow(last)
        tree = yield from driven(self.inner.propose(last))
        if self.position < len(self.known):
            many = int((self.rounds + 1) * self.accepted + 1e-9) - int(self.rounds * self.accepted + 1e-9)
            self.tables[many] = self.tables[many].to(tree.tokens.device)
            tree.tokens[1:] = self.tables[many][self.position]
        self.rounds += 1
        return tree

    def _follow(self, last: Verdict) -> None:
        """Find the new root's position in the known answer: its end, once the output differs from it."""
        at = self.position + len(last.path)
        # Check the bonus only: accepted guesses were known tokens, or the output had left the known answer before.
        self.position = at if at < len(self.known) and self.known[at] == last.bonus else len(self.known)


def guesses(shape: TreeShape, known: Sequence[int], accepted: int, vocabulary: int) -> Tensor:
    """Make a (T, M - 1) table: guesses below a root at known[t]. Best children are right down to depth `accepted`."""
    way = [0]  # best child of best child
    while len(way) <= accepted and shape.children[way[-1]]:
        way.append(shape.children[way[-1]][0])
    return guesses_on(shape, known, way, vocabulary)


def guesses_on(shape: TreeShape, known: Sequence[int], way: Sequence[int], vocabulary: int) -> Tensor:
    """Make a (T, M - 1) table: guesses below a root at known[t], of which those of the nodes in `way` are right.

    All others are off by one more than their rank, so that siblings differ and none is right by chance.
    """
    answer_T = torch.tensor([*known, *[0] * shape.depth])
    columns = []
    for node in range(1, len(shape)):
        depth = shape.depths[node]
        shift = 0 if node in way else 1 + shape.ranks[node]
        columns.append((answer_T[depth : depth + len(known)] + shift) % vocabulary)
    return torch.stack(columns, 1)
