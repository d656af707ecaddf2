"""Expand a static draft tree level by level, on the device only.

Shape suffixes: M tree nodes, Q rows of a pass, T slots that they may attend to, R nodes that are expanded, C children,
D nodes on the longest path, W best tokens taken per node, X corrections per node, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass, Passes, Rows
from specvlm.process.memo import remembered
from specvlm.strategies import Sampling, gumbel
from specvlm.types import DraftTree, TreeShape, ancestor_mask

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


def draw(q_QV: Tensor, race_QV: Tensor, count: int) -> Tensor:
    """Draw ids for each row without replacement, by exponential races (Gumbel top-k).

    Args:
        q_QV: Distribution of each row.
        race_QV: Exponential random numbers, float64.
        count: Number of ids per row.

    Returns:
        (Q, count) ids, in the order drawn.
    """
    return (race_QV / q_QV.double()).topk(count, largest=False).indices  # ids with q = 0 come last, as inf


class Choice(NamedTuple):
    """What a pass finds below its rows.

    Attributes:
        best_RW: The best tokens, best first, or the tokens drawn, in order.
        more_RX: The likeliest other tokens, best first.
        q_RV: Distributions that the tokens were drawn from; None if none were drawn.
    """

    best_RW: Tensor
    more_RX: Tensor
    q_RV: Tensor | None


def choose(
    rows: Rows,
    own_RW: Tensor,
    vocabulary: int,
    rule: Sampling | None,
    races_RV: Tensor,
    noise: Callable[[], Tensor],
    more: int = 0,
) -> Choice:
    """Choose guesses below the last R rows of a pass, on the device only.

    Args:
        rows: Result of the pass.
        own_RW: (R, W) bool, which of the W best tokens of a row become its children.
        vocabulary: Ids below this number are known to both models.
        rule: How tokens are drawn, or scored if the rule is coupled; None ranks them by logits.
        races_RV: Exponential random numbers; not read unless tokens are drawn.
        noise: Makes the noise of a coupled rule, which is added to the logits.
        more: Number X of tokens to find besides the children.
    """
    count, widest = own_RW.shape
    logits_RV, wanted, q_RV = rows.logits(count)[:, :vocabulary], widest + more, None
    if rule is None:
        ranked = rows.best(logits_RV, wanted)
        best = ranked[:, :widest]
    elif rule.coupled:
        ranked = rule.scores(logits_RV, noise()).topk(wanted).indices
        best = ranked[:, :widest]
    else:
        q_RV = rule.probabilities(logits_RV)
        best = draw(q_RV, races_RV, widest)
        ranked = q_RV.topk(wanted).indices if more else best
    if not more:
        return Choice(best, best[:, :0], q_RV)
    children_RW = torch.where(own_RW, best, -1)
    taken = (ranked[:, :, None] == children_RW[:, None]).any(-1)
    others = taken.to(torch.int8).sort(dim=1, stable=True).indices[:, :more]
    return Choice(best, ranked.gather(1, others), q_RV)


FED_22 = torch.ones(2, 2, dtype=torch.bool).tril()  # mask of the last accepted node and the new root


class Level(NamedTuple):
    """Tables of one pass, which expands the nodes of one level.

    Attributes:
        nodes_Q: The nodes that are expanded, one per row. The first pass may feed one row more before them: the last
            accepted node of the old tree.
        depths_Q: Positions of the rows, relative to that of the last accepted node.
        at: Slot of the first row, relative to that of the last accepted node.
        seen_QT: (Q, T) attention mask over slots from that node's on (see `Pass`); None for causal.
        own_RW: (R, W) which of the W best tokens of each expanded node become its children.
        children_C: The nodes whose tokens the pass finds.
        guesses_C: Index of each child's token among the (nodes x W) best tokens.
    """

    nodes_Q: Tensor
    depths_Q: Tensor
    at: int
    seen_QT: Tensor | None
    own_RW: Tensor
    children_C: Tensor
    guesses_C: Tensor


class Tables(NamedTuple):
    """Tables of one round, derived from the tree's shape.

    Attributes:
        ways_MD: Cache rows on the path from the root to each node, counted from the root's. Past the path, position i
            holds i.
        moves: Whether any path has rows to move. A chain's accepted rows are in place already.
        levels: Tables of each pass.
    """

    ways_MD: Tensor
    moves: bool
    levels: tuple[Level, ...]


@remembered(64)
def tables_of(shape: TreeShape, sample: bool, device: torch.device, fed: int) -> Tables:
    """Build the tables of a shape.

    A round writes rows in this order: the last accepted node, the root, then the expanded nodes of each level.

    Args:
        shape: Shape of the tree.
        sample: True if children are drawn: child i of a node is then draw number i. Otherwise a child of rank r is
            number r of the best tokens.
        device: Where the tables are needed.
        fed: Number of rows of the first pass: 2, or 1 for the root alone.
    """
    above_MM = ancestor_mask(shape.parents)
    levels, written, row_of = list[Level](), list[int](), {0: 0}
    for depth, nodes in enumerate(shape.levels):
        at, seen = 2 + len(written), FED_22 if fed == 2 and not depth else None
        if depth:
            written += nodes
            row_of |= {node: at - 1 + row for row, node in enumerate(nodes)}
            own = above_MM[list(nodes)][:, written]
            # The only row of a chain sees everything; attention without a mask is faster.
            seen = None if bool(own.all()) else torch.cat([torch.ones(len(nodes), 2, dtype=torch.bool), own], 1)
        below = [(child, row, order) for row, n in enumerate(nodes) for order, child in enumerate(shape.children[n])]
        children, rows, orders = zip(*below, strict=True)
        guesses = orders if sample else [shape.ranks[child] for child in children]
        widest = max(guesses) + 1
        levels.append(
            Level(
                torch.tensor(nodes, device=device),
                torch.full((len(nodes),), depth + 1, device=device) if depth else torch.arange(2 - fed, 2, device=device),
                at if depth else 2 - fed,
                None if seen is None else seen.to(device, torch.int8),
                owned(zip(rows, guesses, strict=True), len(nodes), widest).to(device),
                torch.tensor(children, device=device),
                torch.tensor([row * widest + guess for row, guess in zip(rows, guesses, strict=True)], device=device),
            )
        )
    ways, length = [DraftTree(torch.empty(0), shape.parents).way_to(node) for node in range(len(shape))], shape.depth + 1
    # An accepted node without a row is fed again, so any row will do. Rows past the path stay where they are.
    rows_MD = [[*(row_of.get(n, at) for at, n in enumerate(way)), *range(len(way), length)] for way in ways]
    moves = any(rows != list(range(length)) for rows in rows_MD)
    return Tables(torch.tensor(rows_MD, device=device), moves, tuple(levels))


def owned(children: Iterable[tuple[int, int]], nodes: int, widest: int) -> Tensor:
    """Mark children, given as pairs of node and guess, in a (nodes, widest) bool table."""
    table = torch.zeros(nodes, widest, dtype=torch.bool)
    for node, guess in children:
        table[node, guess] = True
    return table


def expand(
    tables: Tables,
    vocabulary: int,
    rule: Sampling | None,
    first: int,
    more: int,
    model: VideoLM,
    cache: KVCache,
    state_7: Tensor,
    old_M: Tensor,
    races_RV: Tensor,
    *known: Tensor,
) -> Passes[tuple[Tensor, ...]]:
    """Draft one round: compact the accepted rows, then expand the tree level by level.

    Args:
        tables: Tables of the tree's shape.
        vocabulary: Ids below this number are known to both models.
        rule: How children are drawn, or scored if the rule is coupled; None takes the best tokens by logits.
        first: First level to expand. If it is not 0, the rows of earlier levels are in place, and `old_M` has their
            guesses.
        more: Number X of corrections to find per expanded node (see `choose`).
        model: The model that drafts.
        cache: KV cache of that model.
        state_7: Slot of the last root, slot of the last accepted node, that node, token of the new root, position minus
            slot, seed of a coupled rule, slot of the answer's first token.
        old_M: Tokens of the previous tree.
        races_RV: Exponential random numbers, one row per expanded node; (0,) if children are not drawn.
        known: Only if neither `first` nor `more` is 0: corrections of all expanded nodes, of which those of the levels
            before `first` are valid.

    Returns:
        Tokens (M,); q (M, V), or (0,) if children are not drawn; and if `more` is not 0, corrections of the expanded
        nodes (R, X).
    """
    root, base, node, bonus, offset, seed, start = state_7.split(1)
    drawn = rule is not None and not rule.coupled

    def noise(depth: int) -> Tensor:
        return gumbel(torch.cat([seed, base + 1 - start + depth]), vocabulary)

    if tables.moves and not first:
        cache.move(root, tables.ways_MD.index_select(0, node)[0])
    tokens_M = torch.cat([bonus, old_M[1:]])  # the levels overwrite all other old guesses
    q_MV = races_RV
    if drawn:
        wide = torch.promote_types(model.dtype, torch.float32)
        q_MV = races_RV.new_zeros((len(old_M), vocabulary), dtype=wide)
    done = sum(level.nodes_Q.numel() for level in tables.levels[:first])
    others = [corrections_RX[:done] for corrections_RX in known]
    for depth, level in enumerate(tables.levels, start=1):
        if depth <= first:
            continue
        fed = tokens_M.index_select(0, level.nodes_Q) if level.at else torch.cat([old_M.index_select(0, node), bonus])
        rows = yield Pass(model, cache, fed, level.depths_Q, level.seen_QT, base, offset, level.at)
        count = level.nodes_Q.numel()
        races = races_RV[done : done + count]
        found = choose(rows, level.own_RW, vocabulary, rule, races, partial(noise, depth), more)
        if found.q_RV is not None:
            q_MV.index_copy_(0, level.nodes_Q, found.q_RV)
        done += count
        others.append(found.more_RX)
        tokens_M.index_copy_(0, level.children_C, found.best_RW.take(level.guesses_C))
    return (tokens_M, q_MV, torch.cat(others)) if more else (tokens_M, q_MV)
