"""Grow a tree where the draft model is confident, then cut it back to its best nodes (EAGLE-2).

Shape suffixes: W nodes expanded on a level, R rows written below the root so far, T rows that a pass attends to,
Q rows of a pass, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass, Passes, Routine, Work
from specvlm.strategies import DraftContext, Drafter, Sampling, gumbel
from specvlm.strategies.drafters.growing import Growth, grow, unpacked
from specvlm.strategies.drafters.pruned import PrunedSession, drafting_model
from specvlm.types import DEEPEST, MOST_GUESSES, DraftTree, Verdict, Within

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

WIDEST = 128  # maximum number of nodes expanded on one level


def candidates(depth: int, width: int) -> int:
    """Count the guesses if the root and then `width` nodes per level are expanded to `width` children each."""
    return width + (depth - 1) * width**2


class Pace:
    """Chooses the next tree's depth and width from a request's rounds so far. This base class keeps both fixed.

    Attributes:
        extent: Depth and width of the next tree.
    """

    def __init__(self, depth: int, width: int) -> None:
        self.extent = (depth, width)

    def went(self, accepted: int, confidence: float) -> None:
        """Record a round: the number of accepted guesses, and the draft's confidence below the root (`Growth.top`)."""


class GrownTreeDrafter(Drafter):
    """Base class of drafters that grow a tree. State that adapts the tree to earlier rounds belongs in a `Pace`.

    Attributes:
        nodes: Maximum number of guesses per round.
    """

    prefills = True
    nodes: int

    @abstractmethod
    def extents(self) -> list[tuple[int, int]]:
        """Return every (depth, width) that a tree may have."""

    @abstractmethod
    def growth(self, depth: int, width: int) -> Growth:
        """Return how a tree of this depth and width grows."""

    @abstractmethod
    def pace(self) -> Pace:
        """Create the pace of a new request."""

    @property
    def max_nodes(self) -> int:
        return 1 + self.nodes

    @property
    def max_rows(self) -> int:
        return max(self.max_nodes, *(1 + sum(self.growth(*extent).rows) for extent in self.extents()))

    def start(self, ctx: DraftContext) -> GrownSession:
        widest = max(max(self.growth(*extent).columns) for extent in self.extents())
        if widest > ctx.vocabulary:
            raise UserError(f"drafter={self.name} needs {widest} guesses per node, there are {ctx.vocabulary} tokens")
        return GrownSession(ctx, drafting_model(ctx, self.model), self)


@dataclass(frozen=True)
class DynamicTreeDrafter(GrownTreeDrafter):
    """Expand and re-rank: grow a wide tree and keep the `nodes` guesses that are most likely to be reached.

    The value of a node is the product of the draft's probabilities on the path from the root. The expansion phase
    expands the `width` nodes of highest value on each level to their `width` best children each. Of all candidates, the
    re-ranking phase keeps the `nodes` of highest value. They form a tree, since no child is worth more than its parent
    and ties go to the earlier node. If the draft's probabilities equal the chances of acceptance (EAGLE-2 finds them
    close), no other tree of this size within the candidates accepts more tokens in expectation. Children are the best
    tokens, never drawn from q, so the output is exact under every lossless verifier. Under `coupled`, scores with the
    shared noise take the place of logits in all of this.

    EAGLE-2 (arXiv 2406.16858), sections "Expansion Phase" and "Reranking Phase".
    Deviations: any draft model instead of EAGLE's head on the target's features. Nodes and depth default to SpecVLM's
    tree, 25 guesses in 5 passes; EAGLE-2 uses 60 in 6. A width of 10 is EAGLE-2's.

    Cost: `depth` passes per round, of `width` rows each after the first, a log-softmax of each pass's logits, a sort of
    the candidates, and one more read on the host than a static tree takes, that of the shape. Limits: a draft that is
    confidently wrong, such as one that sees little of the video, grows the tree in the wrong place.

    Attributes:
        nodes: Guesses per round.
        depth: Draft passes per round, and maximum depth of the tree.
        width: Nodes expanded per level, and children of each.

    Raises:
        ValueError: A field is below 1, or depth and width give fewer than `nodes` guesses.
    """

    name = "dynamic_tree"
    paper = "EAGLE-2 (arXiv 2406.16858)"
    fidelity = "adapted"

    nodes: Annotated[int, Within(1, MOST_GUESSES)] = 25
    depth: Annotated[int, Within(1, DEEPEST)] = 5
    width: Annotated[int, Within(1, WIDEST)] = 10

    def __post_init__(self) -> None:
        if self.depth < 1 or self.width < 1 or self.nodes < 1:
            raise ValueError(f"nodes, depth and width must be at least 1, got {self.nodes}, {self.depth} and {self.width}")
        if (most := candidates(self.depth, self.width)) < self.nodes:
            raise ValueError(
                f"depth {self.depth} and width {self.width} give {most} guesses to choose nodes={self.nodes} from: increase one"
            )

    def extents(self) -> list[tuple[int, int]]:
        return [(self.depth, self.width)]

    def growth(self, depth: int, width: int) -> Growth:
        return Growth((width,) * depth, (width,) * (depth - 1), self.nodes)

    def pace(self) -> Pace:
        return Pace(self.depth, self.width)


def round_of(
    vocabulary: int, growth: Growth, rule: Sampling | None, model: VideoLM, cache: KVCache, state: Tensor
) -> Passes[tuple[Tensor]]:
    """Draft one round: compact the accepted rows, feed the last accepted token and the new root, grow and cut a tree.

    Args:
        vocabulary: Ids below this number are known to both models.
        growth: How the tree grows.
        rule: Coupled sampling, by whose scores the tree grows; None grows it by logits.
        model: The model that drafts.
        cache: KV cache of that model.
        state: Slot of the last root, slot of the accepted node, token of the accepted node, token of the new root,
            position minus slot, seed of the rule, slot of the answer's first token, and the cache rows on the path to
            the accepted node, counted from the last root's. The accepted node is the last one of the accepted path.

    Returns:
        The tree, as `Grown.packed` encodes it.
    """
    root, base, old, bonus, offset, seed, start = state[:7].split(1)
    cache.move(root, state[7:])
    steps = torch.arange(len(growth.columns) + 1, device=bonus.device)

    def scored(logits_QV: Tensor, level: int) -> Tensor:
        logits_QV = logits_QV[:, :vocabulary]
        if rule is None:
            return logits_QV
        return rule.scores(logits_QV, gumbel(torch.cat([seed, base + 2 - start + level]), vocabulary))

    def expand(tokens_W: Tensor, level: int, seen_WR: Tensor) -> Passes[Tensor]:
        fed_W2 = torch.ones(len(tokens_W), 2, dtype=torch.int8, device=bonus.device)
        seen_WT, depths_W = torch.cat([fed_W2, seen_WR.to(torch.int8)], 1), steps[level + 1].expand(len(tokens_W))
        rows = yield Pass(model, cache, tokens_W, depths_W, seen_WT, base, offset, 2 + sum(growth.rows[: level - 1]))
        return scored(rows.logits(), level)

    fed_22 = torch.ones(2, 2, dtype=torch.int8, device=bonus.device).tril()
    rows = yield Pass(model, cache, torch.cat([old, bonus]), steps[:2], fed_22, base, offset)
    grown = yield from grow(bonus, scored(rows.logits(1), 0), growth, expand)
    return (grown.packed(),)


class GrownSession(PrunedSession):
    """Grows one tree per round. The host reads the tree's shape, and passes the accepted rows to the next round."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter) -> None:
        super().__init__(ctx, model, drafter.max_rows)
        self.drafter, self.pace, self.confidence = drafter, drafter.pace(), 0.0
        self.rule = ctx.sampling if ctx.sampling.coupled else None
        self.deepest = max(depth for depth, _ in drafter.extents())
        self.last = int(ctx.prompt.tokens[-1])
        self.guesses: list[int] = []
        self.rows: list[int] = []

    def _round(self, growth: Growth) -> Routine:
        """Return the routine that drafts one round of this growth.

        `Routine.state` is for the runs that capture it, and makes them write to free slots only.
        """
        return Routine(
            partial(round_of, self.ctx.vocabulary, growth, self.rule),
            ("grown", growth, self.deepest, self.ctx.vocabulary, self.rule),
            self.model,
            self.cache,
            max(2, *growth.rows, 0),
            (self.free, self.free, 0, 0, 0, 0, 0, *range(self.deepest + 1)),
        )

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Draft a tree from the last verdict, and remember its guesses and rows for the next one."""
        path, bonus = ((0,), self.ctx.bonus) if last is None else (last.path, last.bonus)
        if last is not None:
            self.pace.went(last.accepted, self.confidence)
            self.last = self.guesses[path[-1]]
        # An accepted node without a row is fed again, so any row will do. Rows past the path stay where they are.
        rows = [self.rows[node] if node and self.rows[node] >= 0 else at for at, node in enumerate(path)]
        rows += range(len(rows), self.deepest + 1)
        base = self.root + len(path) - 1
        state = (self.root, base, self.last, bonus, self.cache.offset, *self.noise, *rows)
        (packed,) = yield self._round(self.drafter.growth(*self.pace.extent))(state)
        # The only read on the host per round.
        self.guesses, parents, self.rows, self.confidence = unpacked(packed.tolist())
        self.root = base + 1
        return DraftTree(packed[: len(parents)], parents, varies=True)
