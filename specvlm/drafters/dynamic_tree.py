"""Grow a tree where the draft model is sure of itself, and cut it back to its best nodes (EAGLE-2).

Shape suffixes: W nodes expanded on a level, R rows written below the root so far, C candidates (the root is number 0), M tree
nodes, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from torch import Tensor

from specvlm.drafters.tree import PrunedSession
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.strategy import DraftContext, Drafter, DraftSession
from specvlm.types import DEEPEST, MOST_GUESSES, DraftTree, Verdict, Within

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

WIDEST = 128  # nodes of a level that are expanded


def candidates(depth: int, width: int) -> int:
    """How many guesses so many levels of so many expanded nodes give, `width` below each."""
    return width + (depth - 1) * width**2


class GrownTreeDrafter(Drafter):
    """Any drafter whose tree is grown: what `extent` says of depth and width is grown, and the best of it proposed."""

    tells = True
    nodes: int

    @abstractmethod
    def extents(self) -> list[tuple[int, int]]:
        """Every (depth, width) that `extent` may give."""

    @abstractmethod
    def extent(self, logits_1V: Tensor) -> tuple[int, int]:
        """Depth and width of this round's tree, after the logits below its root."""

    @property
    def max_nodes(self) -> int:
        return 1 + self.nodes

    @property
    def max_rows(self) -> int:
        return max(self.max_nodes, *(1 + (depth - 1) * width for depth, width in self.extents()))

    def _check(self) -> None:
        """Raises ValueError where some extent has fewer candidates than the tree has nodes."""
        for depth, width in self.extents():
            if depth < 1 or width < 1 or self.nodes < 1:
                raise ValueError(f"nodes, depth and width must be at least 1, got {self.nodes}, {depth} and {width}")
            if (most := candidates(depth, width)) < self.nodes:
                raise ValueError(
                    f"depth {depth} and width {width} give {most} guesses to choose nodes={self.nodes} of: widen one"
                )

    def start(self, ctx: DraftContext) -> DraftSession:
        model = ctx.target if self.model == "target" else ctx.draft
        assert model is not None
        widest = max(width for _, width in self.extents())
        if widest > ctx.vocabulary:
            raise UserError(f"drafter={self.name} asks {widest} guesses of a node, there are {ctx.vocabulary} tokens")
        engine, ranks = ctx.engine or Engine(), ctx.target.ranks
        if model.ranks.size == ranks.size:
            return engine.grown_session(ctx, model, self)
        return ToldTree(engine.grown_session(ctx, model, self) if ranks.rank == 0 else None, ctx)


@dataclass(frozen=True)
class DynamicTreeDrafter(GrownTreeDrafter):
    """Expand and re-rank: of all that was guessed, the `nodes` with the highest probability of being reached.

    Level by level the `width` nodes of the highest cumulative log-probability (the sum of the draft's own log-probabilities on
    the way from the root) are expanded to `width` children each. Of all candidates the best `nodes` stay: since no child is
    more probable than its parent and equal values go to the earlier one, they are connected. As far as the draft's
    probabilities are the chances of acceptance (EAGLE-2 finds them close to), no tree of as many nodes within the candidates
    accepts more in expectation. Children are the best tokens, never drawn, so the tree is exact under every verifier.

    EAGLE-2 (arXiv 2406.16858), with any draft model. nodes: guesses, 25 as in the paper's static tree, which SpecVLM drafts
    with (EAGLE-2: 60); depth: passes of the draft a round, 5 as in that tree (EAGLE-2: 6); width: 10, EAGLE-2's.

    Cost: `depth` passes a round, of `width` rows after the first, a log-softmax of each, a sort of the candidates, and one
    more read on the host than a static tree costs: the shape. Limits: a draft that is sure where it is wrong (one that sees
    little of the video) grows in the wrong place. ValueError where depth and width give fewer than `nodes` guesses.
    """

    name = "dynamic_tree"

    nodes: Annotated[int, Within(1, MOST_GUESSES)] = 25
    depth: Annotated[int, Within(1, DEEPEST)] = 5
    width: Annotated[int, Within(1, WIDEST)] = 10

    def __post_init__(self) -> None:
        self._check()

    def extents(self) -> list[tuple[int, int]]:
        return [(self.depth, self.width)]

    def extent(self, logits_1V: Tensor) -> tuple[int, int]:
        return self.depth, self.width


class Grown(NamedTuple):
    """A tree as tensors. rows: where a node was written, counted from the root's row; -1: it was never expanded."""

    tokens_M: Tensor
    parents_M: Tensor
    rows_M: Tensor


def grow(
    root_1: Tensor,
    logits_1V: Tensor,
    depth: int,
    width: int,
    nodes: int,
    expand: Callable[[Tensor, int, Tensor], Tensor],
) -> Grown:
    """A tree below the token `root`, with nothing the host must know. logits: below the root.

    expand: (W, V) logits of tokens (W,) at a depth, given which of the rows below the root each sees, (W, R) with its own.
    """
    device = logits_1V.device
    tokens_C, values_C = [root_1], [logits_1V.new_zeros(1, dtype=torch.promote_types(logits_1V.dtype, torch.float32))]
    parents_C, rows_C = [root_1.new_full((1,), -1)], [root_1.new_zeros(1)]
    above_W, count = root_1.new_zeros(1), 1  # the candidates expanded last, how many there are
    logits_WV, seen_WR = logits_1V, torch.zeros(1, 0, dtype=torch.bool, device=device)
    value_W = values_C[0]
    for level in range(1, depth + 1):
        best = logits_WV.to(value_W.dtype).log_softmax(-1).topk(width)
        tokens, values = best.indices.flatten(), (value_W[:, None] + best.values).flatten()
        parents = above_W.repeat_interleave(width)
        tokens_C.append(tokens)
        values_C.append(values)
        parents_C.append(parents)
        rows_C.append(torch.full_like(tokens, -1))
        if level == depth:
            break
        chosen_W = values.sort(descending=True, stable=True).indices[:width]
        # In the order of their numbers, so that rows, like nodes, come in the order they were guessed in.
        chosen_W = chosen_W.sort().values
        first = 1 + (level - 1) * width
        rows_C[-1] = rows_C[-1].scatter(0, chosen_W, first + torch.arange(width, device=device))
        own_WW = torch.eye(width, dtype=torch.bool, device=device)
        seen_WR = torch.cat([seen_WR[chosen_W // width], own_WW], 1)
        above_W, value_W, count = count + chosen_W, values[chosen_W], count + len(tokens)
        logits_WV = expand(tokens[chosen_W], level, seen_WR)
    value_C = torch.cat(values_C)
    best_M = value_C[1:].sort(descending=True, stable=True).indices[:nodes] + 1
    kept_M = torch.cat([best_M.new_zeros(1), best_M.sort().values])
    parents_M = torch.searchsorted(kept_M, torch.cat(parents_C)[kept_M])
    parents_M = torch.where(kept_M > 0, parents_M, -1)
    return Grown(torch.cat(tokens_C)[kept_M], parents_M, torch.cat(rows_C)[kept_M])


class GrownSession(PrunedSession):
    """Grows a tree a round, and keeps the rows of what was accepted of it."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter) -> None:
        super().__init__(ctx, model, drafter.max_rows)
        self.drafter = drafter
        self.tokens = torch.zeros(1, dtype=torch.int64)
        self.row_of: dict[int, int] = {}

    def propose(self, last: Verdict | None) -> DraftTree:
        if last is not None:
            self._settle(last, self.tokens, self.row_of)
        root_1 = torch.tensor(self.pending[-1:], device=self.model.head_device)
        logits_1V = self._root()
        depth, width = self.drafter.extent(logits_1V)
        self.tokens, *shape = grow(root_1, logits_1V, depth, width, self.drafter.nodes, self._expand)
        parents, rows = torch.stack(shape).tolist()
        self.row_of = {node: row for node, row in enumerate(rows) if row >= 0}
        return DraftTree(self.tokens, tuple(parents), varies=True)

    def _expand(self, tokens_W: Tensor, depth: int, seen_WR: Tensor) -> Tensor:
        logits = self.model.append(tokens_W, [depth] * len(tokens_W), seen_WR, self.cache, self.base)
        return logits[:, : self.ctx.vocabulary]


class ToldTree(DraftSession):
    """Of a draft that lies on the first rank alone: that one drafts, and tells the others tokens and shape."""

    def __init__(self, session: DraftSession | None, ctx: DraftContext) -> None:
        self.session, self.ranks, self.device = session, ctx.target.ranks, ctx.target.device

    def propose(self, last: Verdict | None) -> DraftTree:
        def told() -> tuple[list[int], tuple[int, ...]]:
            assert self.session is not None
            tree = self.session.propose(last)
            return tree.tokens.tolist(), tree.parents

        tokens, parents = self.ranks.share(told)
        return DraftTree(torch.tensor(tokens, device=self.device), parents, varies=True)
