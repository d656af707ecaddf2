"""Grow a tree where the draft model is sure of itself, and cut it back to its best nodes (EAGLE-2).

Shape suffixes: W nodes expanded on a level, R rows written below the root so far, C candidates (the root is number 0), M tree
nodes, K best tokens, V vocabulary.
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

WIDEST = 128  # nodes of a level that are expanded


def candidates(depth: int, width: int) -> int:
    """How many guesses so many levels of so many expanded nodes give, `width` below each."""
    return width + (depth - 1) * width**2


class Pace:
    """What a request's rounds so far say of the next tree's depth and width. Here: nothing, both are fixed."""

    def __init__(self, depth: int, width: int) -> None:
        self.extent = (depth, width)

    def went(self, accepted: int, confidence: float) -> None:
        """Takes up a round: guesses accepted, and the draft's `confidence` below its root."""


@dataclass(frozen=True)
class Growth:
    """How a tree grows, all of it known before the first pass: so that one captured program serves every round of it.

    Attributes:
        columns: For each level, the most children of a node.
        rows: For each level but the last, the nodes that are expanded: `open` ones first, then by probability.
        nodes: Guesses that are kept at most: inner ones first (see `grow`), then by probability.
        shares: For each level a number s: of a node reached with probability P only max(1, floor(s * (0.5 + P))) children
            are inner ones. Empty: all are.
        least: For each level but the last, the probability that an open node must exceed. Empty: all inner ones are open.
        step: The tree, its root included, is filled up to a multiple of this.
        top: Of how many tokens the entropy is taken for the confidence; 0: there is none.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    nodes: int
    shares: tuple[float, ...] = ()
    least: tuple[float, ...] = ()
    step: int = 1
    top: int = 0


class GrownTreeDrafter(Drafter):
    """Any drafter whose tree is grown. What it goes by from round to round is in the session's `Pace`, never in itself."""

    nodes: int

    @abstractmethod
    def extents(self) -> list[tuple[int, int]]:
        """Every (depth, width) that a round's tree may have."""

    @abstractmethod
    def growth(self, depth: int, width: int) -> Growth: ...

    @abstractmethod
    def pace(self) -> Pace:
        """A new one, for a request that begins."""

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
    """Expand and re-rank: of all that was guessed, the `nodes` with the highest probability of being reached.

    The value of a node is the product of the draft's own probabilities on the way to it from the root. Expansion phase: level
    by level the `width` nodes of the highest value are expanded to their `width` best children each. Re-ranking phase: of all
    candidates the `nodes` of the highest value stay. No child is worth more than its parent and equal values go to the earlier
    one, so they are connected. As far as the draft's probabilities are the chances of acceptance (EAGLE-2 finds them close
    to), no tree of as many nodes within the candidates accepts more in expectation. Children are the best tokens, never drawn,
    so the tree is exact under every verifier.

    EAGLE-2 (arXiv 2406.16858), sections "Expansion Phase" and "Reranking Phase".
    Deviations: any draft model in the place of EAGLE's head over the target's features. Defaults of size are SpecVLM's tree's:
    25 guesses in 5 passes; EAGLE-2 has 60 in 6. width 10 is EAGLE-2's.

    nodes: guesses; depth: passes of the draft a round; width: see above.
    Cost: `depth` passes a round, of `width` rows after the first, a log-softmax of each, a sort of the candidates, and one
    more read on the host than a static tree costs: the shape. Limits: a draft that is sure where it is wrong (one that sees
    little of the video) grows in the wrong place. ValueError where depth and width give fewer than `nodes` guesses.
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
    """A tree as tensors. rows: where a node was written, counted from the root's row; -1: it was never expanded.

    count: nodes, the root included; what comes behind them is to be left away. confidence: of the draft below the root.
    """

    tokens_M: Tensor
    parents_M: Tensor
    rows_M: Tensor
    count_1: Tensor
    confidence_1: Tensor

    def packed(self) -> Tensor:
        """(3 M + 2,) integers, for one read on the host; the tokens come first."""
        confidence = self.confidence_1.double().view(torch.int64)
        return torch.cat([self.tokens_M, self.parents_M, self.rows_M, self.count_1, confidence])


def unpacked(integers: list[int]) -> tuple[list[int], tuple[int, ...], list[int], float]:
    """Tokens, parents, rows and confidence of what was `packed`."""
    *nodes, count, bits = integers
    most = len(nodes) // 3
    tokens, parents, rows = (nodes[start : start + count] for start in range(0, 3 * most, most))
    return tokens, tuple(parents), rows, struct.unpack("d", struct.pack("q", bits))[0]


def round_of(vocabulary: int, growth: Growth, model: VideoLM, cache: KVCache, state: Tensor) -> Passes[tuple[Tensor]]:
    """A round: what was accepted moves together, its last token and the new root are fed, a tree is grown and cut. Packed.

    state: slot of the last root, slot of the accepted node, that node's token, the new root's, position minus slot, and the
    rows on the way to the accepted node, counted from the last root's.
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
    """A tree below the token `root`, with nothing the host must know. logits: below the root.

    Inner nodes are the children that `growth.shares` leaves of nodes that are open; the root is both. Places that they leave
    free, of rows as of nodes, go to the best of the others: numbers of rows are fixed, and unused ones would cost as much.

    expand: (W, V) logits of tokens (W,) at a depth, given which of the rows below the root each sees, (W, R) with its own; a
    generator of passes where it needs a model.
    """
    device, wide = logits_1V.device, torch.promote_types(logits_1V.dtype, torch.float32)
    tokens_C, values_C = [root_1], [logits_1V.new_zeros(1, dtype=wide)]
    parents_C, rows_C = [root_1.new_full((1,), -1)], [root_1.new_zeros(1)]
    inner_C = [torch.ones(1, dtype=torch.bool, device=device)]
    above_W, open_W, value_W = root_1.new_zeros(1), inner_C[0], values_C[0]  # the candidates expanded last
    logits_WV, seen_WR = logits_1V, torch.zeros(1, 0, dtype=torch.bool, device=device)
    count, first = 1, 1  # candidates, and rows, so far
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
        # In the order of their numbers, so that rows, like nodes, come in the order they were guessed in.
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
    """Numbers, those `before` first, the highest values first, then the lowest numbers."""
    order = values.sort(descending=True, stable=True).indices
    return order[before[order].to(torch.int8).sort(descending=True, stable=True).indices]


def _cut(
    growth: Growth, confidence_1: Tensor, tokens_C: Tensor, values_C: Tensor, parents_C: Tensor, rows_C: Tensor, inner_C: Tensor
) -> Grown:
    """The root, the best inner nodes, and as many of the others as fill up the last step."""
    last, most = len(tokens_C) - 1, min(growth.nodes, len(tokens_C) - 1)
    steps_1 = (inner_C.sum(0, keepdim=True).clamp(max=most + 1) + growth.step - 1) // growth.step
    count_1 = (steps_1 * growth.step).clamp(max=most + 1)
    best = _ranked(values_C[1:], inner_C[1:])[:most] + 1
    best = torch.where(torch.arange(1, most + 1, device=best.device) < count_1, best, last + 1)  # past the end, and sorted last
    kept_M = torch.cat([best.new_zeros(1), best.sort().values])
    at_M = kept_M.clamp(max=last)
    parents_M = torch.searchsorted(kept_M, parents_C[at_M])
    parents_M = torch.where(kept_M > 0, parents_M, -1)
    return Grown(tokens_C[at_M], parents_M, rows_C[at_M], count_1, confidence_1)


def _confidence(logits_1V: Tensor, top: int) -> Tensor:
    """(1,) 1 - H / log k, H the entropy of the k best tokens' probabilities, which are made to add up to 1. 0 of logits that
    give no distribution: what a draft guesses, however wrong, stops no request.
    """
    count = min(top, logits_1V.shape[-1])
    if count < 2:
        return logits_1V.new_ones(1, dtype=torch.float64)
    p_1K = logits_1V.topk(count).values.double().softmax(-1)
    return (1 - torch.special.entr(p_1K).sum(-1) / math.log(count)).nan_to_num(nan=0.0)


class GrownSession(PrunedSession):
    """Grows a tree a round. The host reads its shape, and writes back the rows on the accepted way."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter) -> None:
        super().__init__(ctx, model, drafter.max_rows)
        self.drafter, self.pace, self.confidence = drafter, drafter.pace(), 0.0
        self.deepest = max(depth for depth, _ in drafter.extents())
        self.last = int(ctx.prompt.tokens[-1])
        self.guesses: list[int] = []
        self.rows: list[int] = []

    def _round(self, growth: Growth) -> Routine:
        return Routine(
            partial(round_of, self.ctx.vocabulary, growth),
            ("grown", growth, self.deepest, self.ctx.vocabulary),
            self.model,
            self.cache,
            max(2, *growth.rows, 0),
            (self.free, self.free, 0, 0, 0, *range(self.deepest + 1)),
        )

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        path, bonus = ((0,), self.ctx.bonus) if last is None else (last.path, last.bonus)
        if last is not None:
            self.pace.went(last.accepted, self.confidence)
            self.last = self.guesses[path[-1]]
        # What was never expanded is fed again, so any row will do; behind its end a way goes straight on.
        way = [self.rows[node] if node and self.rows[node] >= 0 else at for at, node in enumerate(path)]
        way += range(len(way), self.deepest + 1)
        base = self.root + len(path) - 1
        state = (self.root, base, self.last, bonus, self.cache.offset, *way)
        (packed,) = yield self._round(self.drafter.growth(*self.pace.extent))(state)
        # The one read of a round's draft.
        self.guesses, parents, self.rows, self.confidence = unpacked(packed.tolist())
        self.root = base + 1
        return DraftTree(packed[: len(parents)], parents, varies=True)
