"""Grow a tree where the draft model is confident, then cut it back to its best nodes (EAGLE-2).

Shape suffixes: W nodes expanded on a level, R rows written below the root so far, C candidates (the root is number 0),
M tree nodes, K best tokens, V vocabulary.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass, Passes, Routine, Work, driven
from specvlm.strategies import DraftContext, Drafter
from specvlm.strategies.drafters.tree import PrunedSession, drafting_model
from specvlm.types import DEEPEST, MOST_GUESSES, DraftTree, Verdict, Within

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

WIDEST = 128  # most nodes expanded on one level


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
        """Record a round: the number of accepted guesses, and the draft's `confidence` below the root."""


@dataclass(frozen=True)
class Growth:
    """How a tree grows. All sizes are known before the first pass, so that one captured program serves every round.

    See `grow` for the terms inner and open.

    Attributes:
        columns: Most children of a node, per level.
        rows: Number of nodes expanded, per level but the last. Open nodes come first, then the most probable ones.
        nodes: Most guesses that are kept. Inner nodes come first, then the most probable ones.
        shares: A number s per level. Of an open node reached with probability P, the first
            max(1, floor(s * (0.5 + P))) children are inner nodes. Empty: all children of open nodes are.
        least: Probability that an open node must exceed, per level but the last. Empty: all inner nodes are open.
        step: The number of nodes, root included, is rounded up to a multiple of this, but not above `nodes` + 1.
        top: Number of most probable tokens whose entropy gives the confidence; below 2, the confidence is 1.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    nodes: int
    shares: tuple[float, ...] = ()
    least: tuple[float, ...] = ()
    step: int = 1
    top: int = 0


class GrownTreeDrafter(Drafter):
    """Base class of drafters that grow a tree. State that changes from round to round is in the session's `Pace`."""

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
            raise UserError(f"drafter={self.name} asks {widest} guesses of a node, there are {ctx.vocabulary} tokens")
        return GrownSession(ctx, drafting_model(ctx, self.model), self)


@dataclass(frozen=True)
class DynamicTreeDrafter(GrownTreeDrafter):
    """Expand and re-rank: grow a wide tree and keep the `nodes` guesses that are most likely to be reached.

    The value of a node is the product of the draft's probabilities on the path from the root. The expansion phase
    expands the `width` nodes of highest value on each level to their `width` best children each. Of all candidates, the
    re-ranking phase keeps the `nodes` of highest value. They form a tree, since no child is worth more than its parent
    and ties go to the earlier node. If the draft's probabilities equal the chances of acceptance (EAGLE-2 finds them
    close), no other tree of this size within the candidates accepts more tokens in expectation. Children are the best
    tokens, never drawn, so the tree is exact under every lossless verifier.

    EAGLE-2 (arXiv 2406.16858), sections "Expansion Phase" and "Reranking Phase".
    Deviations: any draft model instead of EAGLE's head on the target's features. Nodes and depth default to SpecVLM's
    tree, 25 guesses in 5 passes; EAGLE-2 uses 60 in 6. A width of 10 is EAGLE-2's.

    Cost: `depth` passes per round, of `width` rows each after the first, a log-softmax of each, a sort of the
    candidates, and one more read on the host than a static tree takes, that of the shape. Limits: a draft that is
    confidently wrong, such as one that sees little of the video, grows the tree in the wrong place.

    Attributes:
        nodes: Guesses per round.
        depth: Draft passes per round, and levels of the tree.
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
                f"depth {self.depth} and width {self.width} give {most} guesses to choose nodes={self.nodes} of: widen one"
            )

    def extents(self) -> list[tuple[int, int]]:
        return [(self.depth, self.width)]

    def growth(self, depth: int, width: int) -> Growth:
        return Growth((width,) * depth, (width,) * (depth - 1), self.nodes)

    def pace(self) -> Pace:
        return Pace(self.depth, self.width)


class Grown(NamedTuple):
    """A grown tree as tensors, of which only the first `count_1` nodes are valid.

    Attributes:
        tokens_M: Token of each node.
        parents_M: Parent of each node; -1 for the root.
        rows_M: Cache row of each node, counted from the root's; -1 if the node was not expanded.
        count_1: Number of nodes, root included.
        confidence_1: The draft's confidence below the root, float64.
    """

    tokens_M: Tensor
    parents_M: Tensor
    rows_M: Tensor
    count_1: Tensor
    confidence_1: Tensor

    def packed(self) -> Tensor:
        """Pack the tree into (3 M + 2,) integers, tokens first, so that the host reads it at once."""
        confidence = self.confidence_1.double().view(torch.int64)
        return torch.cat([self.tokens_M, self.parents_M, self.rows_M, self.count_1, confidence])


def unpacked(integers: list[int]) -> tuple[list[int], tuple[int, ...], list[int], float]:
    """Unpack the integers of `Grown.packed` to tokens, parents, rows and confidence."""
    *nodes, count, bits = integers
    most = len(nodes) // 3
    tokens, parents, rows = (nodes[start : start + count] for start in range(0, 3 * most, most))
    return tokens, tuple(parents), rows, struct.unpack("d", struct.pack("q", bits))[0]


def round_of(vocabulary: int, growth: Growth, model: VideoLM, cache: KVCache, state: Tensor) -> Passes[tuple[Tensor]]:
    """Draft one round: compact the accepted rows, feed the last accepted token and the new root, grow and cut a tree.

    Args:
        vocabulary: Ids below this number are known to both models.
        growth: How the tree grows.
        model: The model that drafts.
        cache: Its cache.
        state: Slot of the last root, slot of the accepted node, token of the accepted node, token of the new root,
            position minus slot, and the rows on the path to the accepted node, counted from the last root's.

    Returns:
        The packed tree.
    """
    root, base, old, bonus, offset = state[:5].split(1)
    cache.move(root, state[5:])
    steps = torch.arange(len(growth.columns) + 1, device=bonus.device)

    def expand(tokens_W: Tensor, level: int, seen_WR: Tensor) -> Passes[Tensor]:
        fed_W2 = torch.ones(len(tokens_W), 2, dtype=torch.int8, device=bonus.device)
        seen_WT, depths_W = torch.cat([fed_W2, seen_WR.to(torch.int8)], 1), steps[level + 1].expand(len(tokens_W))
        rows = yield Pass(model, cache, tokens_W, depths_W, seen_WT, base, offset, 2 + sum(growth.rows[: level - 1]))
        return rows.logits()[:, :vocabulary]

    fed_22 = torch.ones(2, 2, dtype=torch.int8, device=bonus.device).tril()
    rows = yield Pass(model, cache, torch.cat([old, bonus]), steps[:2], fed_22, base, offset)
    grown = yield from grow(bonus, rows.logits(1)[:, :vocabulary], growth, expand)
    return (grown.packed(),)


def grow(root_1: Tensor, logits_1V: Tensor, growth: Growth, expand: Callable[[Tensor, int, Tensor], Any]) -> Passes[Grown]:
    """Grow a tree below a root token and cut it back, without reading a tensor on the host.

    The root is inner and open. The other inner nodes are the first children of open nodes, as many as `growth.shares`
    says. Inner nodes above the threshold `growth.least` are open. Free rows of a pass go to the most probable other
    nodes, since the number of rows is fixed and unused ones would cost as much; so do free places up to the next
    `growth.step`.

    Args:
        root_1: Token of the root.
        logits_1V: Logits below the root.
        growth: How the tree grows.
        expand: Called with tokens (W,), their depth, and a mask (W, R) of the rows below the root that each sees, its
            own included. Returns logits (W, V), or a generator of passes that returns them.

    Returns:
        The tree that is left.
    """
    device, wide = logits_1V.device, torch.promote_types(logits_1V.dtype, torch.float32)
    tokens_C, values_C = [root_1], [logits_1V.new_zeros(1, dtype=wide)]
    parents_C, rows_C = [root_1.new_full((1,), -1)], [root_1.new_zeros(1)]
    inner_C = [torch.ones(1, dtype=torch.bool, device=device)]
    above_W, open_W, value_W = root_1.new_zeros(1), inner_C[0], values_C[0]  # the candidates expanded last
    logits_WV, seen_WR = logits_1V, torch.zeros(1, 0, dtype=torch.bool, device=device)
    count, first = 1, 1  # candidates and rows so far
    for level, columns in enumerate(growth.columns):
        best = logits_WV.to(wide).log_softmax(-1).topk(columns)
        tokens, values = best.indices.flatten(), (value_W[:, None] + best.values).flatten()
        inner = open_W[:, None].expand(-1, columns)
        if growth.shares:
            wanted_W = (growth.shares[level] * (0.5 + value_W.exp())).floor().clamp(min=1)
            inner = inner & (torch.arange(columns, device=device) < wanted_W[:, None])
        tokens_C.append(tokens)
        values_C.append(values)
        inner_C.append(inner.flatten())
        parents_C.append(above_W.repeat_interleave(columns))
        rows_C.append(torch.full_like(tokens, -1))
        if level + 1 == len(growth.columns):
            break
        width, opened = growth.rows[level], inner_C[-1]
        if growth.least:
            opened = opened & (values.exp() > growth.least[level])
        # Sort by number, so that rows are in the order of the guesses, like nodes.
        chosen_W = _ranked(values, opened)[:width].sort().values
        rows_C[-1] = rows_C[-1].scatter(0, chosen_W, first + torch.arange(width, device=device))
        own_WW = torch.eye(width, dtype=torch.bool, device=device)
        seen_WR = torch.cat([seen_WR[chosen_W // columns], own_WW], 1)
        above_W, open_W, value_W = count + chosen_W, opened[chosen_W], values[chosen_W]
        count, first = count + len(tokens), first + width
        logits_WV = yield from driven(expand(tokens[chosen_W], level + 1, seen_WR))
    candidates_C = (torch.cat(parts) for parts in (tokens_C, values_C, parents_C, rows_C, inner_C))
    return _cut(growth, _confidence(logits_1V, growth.top), *candidates_C)


def _ranked(values: Tensor, before: Tensor) -> Tensor:
    """Sort indices: those marked in `before` first, then by descending value, then by index."""
    order = values.sort(descending=True, stable=True).indices
    return order[before[order].to(torch.int8).sort(descending=True, stable=True).indices]


def _cut(
    growth: Growth, confidence_1: Tensor, tokens_C: Tensor, values_C: Tensor, parents_C: Tensor, rows_C: Tensor, inner_C: Tensor
) -> Grown:
    """Keep the root and the best inner nodes, and add the best other nodes up to a multiple of `growth.step`."""
    last, most = len(tokens_C) - 1, min(growth.nodes, len(tokens_C) - 1)
    steps_1 = (inner_C.sum(0, keepdim=True).clamp(max=most + 1) + growth.step - 1) // growth.step
    count_1 = (steps_1 * growth.step).clamp(max=most + 1)
    best = _ranked(values_C[1:], inner_C[1:])[:most] + 1
    best = torch.where(torch.arange(1, most + 1, device=best.device) < count_1, best, last + 1)  # last + 1: sorted last
    kept_M = torch.cat([best.new_zeros(1), best.sort().values])
    at_M = kept_M.clamp(max=last)
    parents_M = torch.searchsorted(kept_M, parents_C[at_M])
    parents_M = torch.where(kept_M > 0, parents_M, -1)
    return Grown(tokens_C[at_M], parents_M, rows_C[at_M], count_1, confidence_1)


def _confidence(logits_1V: Tensor, top: int) -> Tensor:
    """Return the confidence 1 - H / log k, where H is the entropy of the k best tokens' normalized probabilities.

    It is 1 for k < 2, and 0 if the logits give no distribution, since a bad draft must not stop a request.
    """
    count = min(top, logits_1V.shape[-1])
    if count < 2:
        return logits_1V.new_ones(1, dtype=torch.float64)
    p_1K = logits_1V.topk(count).values.double().softmax(-1)
    return (1 - torch.special.entr(p_1K).sum(-1) / math.log(count)).nan_to_num(nan=0.0)


class GrownSession(PrunedSession):
    """Grows one tree per round. The host reads its shape, and gives the next round the rows of the accepted path."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter) -> None:
        super().__init__(ctx, model, drafter.max_rows)
        self.drafter, self.pace, self.confidence = drafter, drafter.pace(), 0.0
        self.deepest = max(depth for depth, _ in drafter.extents())
        self.last = int(ctx.prompt.tokens[-1])
        self.guesses: list[int] = []
        self.rows: list[int] = []

    def _round(self, growth: Growth) -> Routine:
        """Return the routine that drafts one round of this growth. Its state is that of a trial run."""
        return Routine(
            partial(round_of, self.ctx.vocabulary, growth),
            ("grown", growth, self.deepest, self.ctx.vocabulary),
            self.model,
            self.cache,
            max(2, *growth.rows, 0),
            (self.free, self.free, 0, 0, 0, *range(self.deepest + 1)),
        )

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Draft a tree from the last verdict, and remember its guesses and rows for the next one."""
        path, bonus = ((0,), self.ctx.bonus) if last is None else (last.path, last.bonus)
        if last is not None:
            self.pace.went(last.accepted, self.confidence)
            self.last = self.guesses[path[-1]]
        # A node that was not expanded is fed again, so any row will do. Rows past the path stay where they are.
        rows = [self.rows[node] if node and self.rows[node] >= 0 else at for at, node in enumerate(path)]
        rows += range(len(rows), self.deepest + 1)
        base = self.root + len(path) - 1
        state = (self.root, base, self.last, bonus, self.cache.offset, *rows)
        (packed,) = yield self._round(self.drafter.growth(*self.pace.extent))(state)
        # The only read on the host per round.
        self.guesses, parents, self.rows, self.confidence = unpacked(packed.tolist())
        self.root = base + 1
        return DraftTree(packed[: len(parents)], parents, varies=True)
