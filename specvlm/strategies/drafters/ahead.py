"""Tables and passes for drafting below several outcomes of a check at once, on the device only.

An outcome is the last accepted node of the current tree, with a correction after it: one of the draft's likeliest
tokens there besides the node's children. Rows of all outcomes share the draft's cache, after those of the current tree.
A row sees its outcome's accepted path, and its ancestors in that outcome's tree. The rows of the outcome that comes
true are moved to where a newly drafted tree would have them.

All tokens found so far are in a pool: those of the current tree, the corrections of its expanded nodes, and what each
pass has found below each of its rows. Tables hold indices into the pool.

Shape suffixes: M tree nodes, E nodes that are expanded, O outcomes, Q rows of a pass, T slots that they may attend to,
W best tokens taken per node, X corrections per node, D rows to move, N tokens of the pool, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass, Passes
from specvlm.process.memo import remembered
from specvlm.strategies import Sampling, gumbel
from specvlm.strategies.drafters.expanding import choose, owned
from specvlm.types import DraftTree, TreeShape

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

WIDEST = 64  # maximum number of rows of a pass, as many as engines capture
# Chance that a guess is right by its rank, as a rule of thumb (embedded pairs, 90 % of the video dropped).
CHANCES = (0.75, 0.12, 0.04, 0.02)


class Row(NamedTuple):
    """A row of a pass that drafts ahead.

    Attributes:
        outcome: Number of the outcome whose tree the node belongs to; None for a leaf of the current tree.
        node: Node of the outcome's tree, or that leaf.
    """

    outcome: int | None
    node: int


class Piece(NamedTuple):
    """Tables of one pass.

    Attributes:
        feed_Q: Index in the pool of each row's token.
        depths_Q: Depth of each row below the current root.
        at: Slot of the first row, relative to the current root's.
        seen_QT: (Q, T) attention mask over slots from that root's on.
        own_QW: Which of the W best tokens of a row become its children.
        races_Q: Which row of the random numbers each row uses.
        out: Index in the pool of the first token that this pass finds. Each row finds W best tokens and X corrections.
    """

    feed_Q: Tensor
    depths_Q: Tensor
    at: int
    seen_QT: Tensor
    own_QW: Tensor
    races_Q: Tensor
    out: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables for all passes below the outcomes of one shape.

    Attributes:
        outcomes: Last accepted node, and number of the correction after it, of each of the O outcomes.
        starts: Number of the pass that feeds each outcome's root.
        pieces: Tables of each pass.
        rows: Number of slots used from the current root's on.
        size: Number N of tokens of the pool.
        bonus_O: Index in the pool of each outcome's correction.
        tokens_OM: Indices in the pool of the tokens of each outcome's tree.
        more_OEX: Indices in the pool of the corrections of that tree's expanded nodes.
        ways_OD: Which slots to move if an outcome comes true; position i names the slot that moves to slot i. Slots
            count from the current root's. First the accepted path, then the new root and the other expanded nodes of
            its tree. Past them, position i holds i.
        found_OE: Number of each expanded node's row among the rows of all passes.
    """

    outcomes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    pieces: tuple[Piece, ...]
    rows: int
    size: int
    bonus_O: Tensor
    tokens_OM: Tensor
    more_OEX: Tensor
    ways_OD: Tensor
    found_OE: Tensor

    def levels(self, number: int, passes: int, depth: int) -> int:
        """Return how many levels `passes` passes expand of the tree of outcome `number`. depth: Levels of the shape."""
        return max(0, min(depth, passes - self.starts[number]))


def outcomes_of(shape: TreeShape, corrections: int) -> list[tuple[int, int]]:
    """List the likeliest outcomes of a tree's check, likeliest first: as many as fit into passes of `WIDEST` rows.

    Each node has at most `corrections` outcomes.
    """

    def chance(rank: int) -> float:
        return CHANCES[min(rank, len(CHANCES) - 1)]

    reached = [1.0]
    for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
        reached.append(reached[parent] * chance(rank))
    every = []
    for node, probability in enumerate(reached):
        taken = {shape.ranks[child] for child in shape.children[node]}
        free = [rank for rank in range(len(taken) + corrections) if rank not in taken][:corrections]
        every += [(probability * chance(rank), node, number) for number, rank in enumerate(free)]
    chosen = list[tuple[int, int]]()
    for _, node, number in sorted(every, key=lambda one: -one[0]):
        if max(map(len, rows_of(shape, [*chosen, (node, number)]))) > WIDEST:
            break
        chosen.append((node, number))
    return chosen


def rows_of(shape: TreeShape, outcomes: list[tuple[int, int]]) -> list[list[Row]]:
    """List the rows of each pass.

    The first pass feeds the leaves that end an outcome's path, and the corrections after other nodes. The second one
    feeds the corrections after leaves, and the next level of the other trees, and so on.
    """
    leaves = dict.fromkeys(node for node, _ in outcomes if not shape.children[node])
    passes: list[list[Row]] = [[] for _ in range(len(shape.levels) + bool(leaves))]
    passes[0] += [Row(None, leaf) for leaf in leaves]
    for number, (node, _) in enumerate(outcomes):
        for level, nodes in enumerate(shape.levels):
            passes[level + (node in leaves)] += [Row(number, one) for one in nodes]
    return passes


@remembered(16)
def plan_of(shape: TreeShape, corrections: int, sample: bool, device: torch.device) -> Plan:
    """Build the tables of a shape.

    Args:
        shape: Shape of the tree.
        corrections: Maximum number of corrections per node, X.
        sample: As for `tables_of`.
        device: Where the tables are needed.
    """
    return _Planner(shape, corrections, sample).plan(device)


class _Planner:
    """Builds a `Plan` on the host."""

    def __init__(self, shape: TreeShape, corrections: int, sample: bool) -> None:
        self.shape, self.corrections = shape, corrections
        self.outcomes = outcomes_of(shape, corrections)
        self.passes = rows_of(shape, self.outcomes)
        self.expanded = [node for level in shape.levels for node in level]
        self.order = {node: number for number, node in enumerate(self.expanded)}
        self.above = DraftTree(torch.empty(0), shape.parents)
        # Number among its node's best tokens, or draws, of each child.
        self.guess = {
            child: order if sample else shape.ranks[child]
            for children in shape.children
            for order, child in enumerate(children)
        }
        self.widths = [
            max((self.guess[child] + 1 for row in rows for child in self.children(row)), default=1) for rows in self.passes
        ]
        self.firsts = [0, *accumulate(map(len, self.passes))]
        sizes = [len(rows) * (width + corrections) for rows, width in zip(self.passes, self.widths, strict=True)]
        self.outs = [*accumulate(sizes, initial=len(shape) + len(self.expanded) * corrections)]
        self.at = {row: (number, place) for number, rows in enumerate(self.passes) for place, row in enumerate(rows)}

    def children(self, row: Row) -> tuple[int, ...]:
        """Children whose tokens a row's pass finds. Below a leaf of the current tree it finds only corrections."""
        return () if row.outcome is None else self.shape.children[row.node]

    def slot(self, row: Row) -> int:
        """Slot of a row, relative to the current root's."""
        number, place = self.at[row]
        return len(self.expanded) + self.firsts[number] + place

    def slots(self, row: Row) -> list[int]:
        """Slots that a row sees, itself included: one per position from the current root on."""
        if row.outcome is None:
            return [*(self.order[node] for node in self.above.way_to(row.node)[:-1]), self.slot(row)]
        return [*self.accepted(row.outcome), *(self.slot(Row(row.outcome, node)) for node in self.above.way_to(row.node))]

    def accepted(self, outcome: int) -> list[int]:
        """Slots of an outcome's accepted path."""
        node = self.outcomes[outcome][0]
        if node in self.order:
            return [self.order[one] for one in self.above.way_to(node)]
        return self.slots(Row(None, node))

    def found(self, row: Row, column: int) -> int:
        """Index in the pool of a token that a row's pass finds; columns are the W best ones, then the corrections."""
        number, place = self.at[row]
        return self.outs[number] + place * (self.widths[number] + self.corrections) + column

    def bonus(self, outcome: int) -> int:
        """Index in the pool of an outcome's correction."""
        node, number = self.outcomes[outcome]
        if node in self.order:
            return len(self.shape) + self.order[node] * self.corrections + number
        row = Row(None, node)
        return self.found(row, self.widths[self.at[row][0]] + number)

    def token(self, outcome: int, node: int) -> int:
        """Index in the pool of the token of a node of an outcome's tree."""
        return self.found(Row(outcome, self.shape.parents[node]), self.guess[node]) if node else self.bonus(outcome)

    def others(self, outcome: int, node: int) -> list[int]:
        """Indices in the pool of the corrections after an expanded node of an outcome's tree."""
        row = Row(outcome, node)
        return [self.found(row, self.widths[self.at[row][0]] + number) for number in range(self.corrections)]

    def way(self, outcome: int) -> list[int]:
        """Slots to move if an outcome comes true, see `Plan.ways_OD`."""
        rows = [*self.accepted(outcome), *(self.slot(Row(outcome, node)) for node in self.expanded)]
        return [*rows, *range(len(rows), len(self.shape.levels) + 1 + len(self.expanded))]

    def piece(self, number: int, device: torch.device) -> Piece:
        """Build the tables of one pass."""
        rows, at = self.passes[number], len(self.expanded) + self.firsts[number]
        seen_QT = torch.zeros(len(rows), at + len(rows), dtype=torch.int8)
        for place, row in enumerate(rows):
            seen_QT[place, self.slots(row)] = 1
        own = [(place, self.guess[child]) for place, row in enumerate(rows) for child in self.children(row)]
        feed = [row.node if row.outcome is None else self.token(row.outcome, row.node) for row in rows]
        races = [0 if row.outcome is None else self.order[row.node] for row in rows]
        return Piece(
            torch.tensor(feed, device=device),
            torch.tensor([len(self.slots(row)) - 1 for row in rows], device=device),
            at,
            seen_QT.to(device),
            owned(own, len(rows), self.widths[number]).to(device),
            torch.tensor(races, device=device),
            self.outs[number],
        )

    def plan(self, device: torch.device) -> Plan:
        """Build all tables."""
        every, nodes = range(len(self.outcomes)), range(len(self.shape))
        table = partial(torch.tensor, device=device)
        return Plan(
            tuple(self.outcomes),
            tuple(int(node not in self.order) for node, _ in self.outcomes),
            tuple(self.piece(number, device) for number in range(len(self.passes))),
            len(self.expanded) + self.firsts[-1],
            self.outs[-1],
            table([self.bonus(one) for one in every]),
            table([[self.token(one, node) for node in nodes] for one in every]),
            table([[self.others(one, node) for node in self.expanded] for one in every]),
            table([self.way(one) for one in every]),
            table([[self.slot(Row(one, node)) - len(self.expanded) for node in self.expanded] for one in every]),
        )


def guess(
    piece: Piece,
    vocabulary: int,
    rule: Sampling | None,
    more: int,
    model: VideoLM,
    cache: KVCache,
    state_4: Tensor,
    pool_N: Tensor,
    races_EV: Tensor,
) -> Passes[tuple[Tensor, ...]]:
    """Run one pass below all outcomes.

    Args:
        piece: Tables of the pass.
        vocabulary, rule, more, model, cache: As for `expand`.
        state_4: Slot of the current root, position minus slot, seed of a coupled rule, slot of the answer's first
            token.
        pool_N: The pool so far.
        races_EV: Random numbers of the next tree, one row per expanded node; (0,) if children are not drawn.

    Returns:
        The pool with the tokens found, and q of the rows, (Q, V), if children are drawn.
    """
    root, offset, seed, start = state_4.split(1)

    def noise() -> Tensor:
        return gumbel(torch.cat([seed, root + 1 - start]), vocabulary, piece.depths_Q)

    fed_Q = pool_N.index_select(0, piece.feed_Q)
    rows = yield Pass(model, cache, fed_Q, piece.depths_Q, piece.seen_QT, root, offset, piece.at)
    races = races_EV.index_select(0, piece.races_Q) if rule is not None and not rule.coupled else races_EV
    found = choose(rows, piece.own_QW, vocabulary, rule, races, noise, more)
    tokens = torch.cat([found.best_RW, found.more_RX], 1).flatten()
    pool_N = torch.cat([pool_N[: piece.out], tokens, pool_N[piece.out + tokens.numel() :]])
    return (pool_N,) if found.q_RV is None else (pool_N, found.q_RV)


def take(plan: Plan, model: VideoLM, cache: KVCache, state_2: Tensor, pool_N: Tensor) -> Passes[tuple[Tensor, Tensor]]:
    """Move the rows of the outcome that came true, and return its tree's tokens (M,) and corrections (E, X).

    state_2: Slot of the previous root, and number of the outcome.
    """
    yield from ()  # it needs no pass
    root, outcome = state_2.split(1)
    cache.move(root, plan.ways_OD.index_select(0, outcome)[0])
    tokens_M, more_EX = (table.index_select(0, outcome)[0] for table in (plan.tokens_OM, plan.more_OEX))
    return pool_N.take(tokens_M), pool_N.take(more_EX)
