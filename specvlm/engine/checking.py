"""A tree's check as functions of device tensors, to be captured: the target's pass, the rule, and the cache's move.

Shape suffixes: M tree nodes, Q rows of a pass, D nodes on the longest path, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from specvlm.engine.lean import LeanText, Sight
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import KVCache, Store
from specvlm.strategies import Verifier, VerifyContext
from specvlm.types import DraftTree

_NOBODY = torch.Generator()  # in a captured step random numbers are inputs


def ways(tree: DraftTree) -> list[list[int]]:
    """For each node the nodes on its way from the root. Behind its end a way goes straight on, so that rows moved along it
    stay where they are.
    """
    length = max(tree.depths) + 1
    return [[*way, *range(len(way), length)] for way in map(tree.way_to, range(len(tree)))]


class Paths(NamedTuple):
    """A tree's ways from the root, as tables on the device. Where they are a step's inputs, ways are as long as a chain of all
    nodes would be, so sizes are fixed.
    """

    nodes_MD: Tensor
    depths_M: Tensor
    seen_MM: Tensor

    @classmethod
    def of(cls, tree: DraftTree, device: torch.device) -> Self:
        nodes, depths = (torch.tensor(table, device=device) for table in (ways(tree), tree.depths))
        return cls(nodes, depths, tree.mask.to(device, torch.int8))


def shape_of(tree: DraftTree, verifier: Verifier) -> tuple[Tensor, ...]:
    """A varying tree's shape as the inputs of a step captured by size; empty where the step is of one shape, or the rule is."""
    tables = verifier.tables(tree.parents) if tree.varies else None
    if tables is None:
        return ()
    paths = Paths.of(tree, torch.device("cpu"))
    further = torch.arange(paths.nodes_MD.shape[1], len(tree)).expand(len(tree), -1)
    return (torch.cat([paths.nodes_MD, further], 1), *paths[1:], *tables)


def check_of(
    lean: LeanText,
    verifier: Verifier,
    parents: tuple[int, ...],
    varies: bool,
    cache: KVCache,
    factor: float,
    paths: Paths,
    state_2: Tensor,
    tokens_M: Tensor,
    seen_V: Tensor,
    dice: Tensor,
    q_MV: Tensor,
    x_MD: Tensor,
    *shape: Tensor,
) -> tuple[Tensor]:
    """Pass, penalty, verdict and cache move, on the last stage's device. state: slot of the root, position - slot. x: rows as
    they left the stage before; empty where there is none. shape: of this very tree (see `shape_of`), in the place of
    `parents`, which then are of some tree of its size; empty where `parents` are its own.
    """
    tree, tables, above_MM = DraftTree(tokens_M, parents, q_MV if len(q_MV) else None, varies), None, None
    if shape:
        paths, tables = Paths(*shape[:3]), shape[3:]
        above_MM = paths.seen_MM.float()
    (hidden_MD,) = pass_of(lean, len(lean.stages) - 1, cache, paths, state_2, x_MD if len(x_MD) else tokens_M)
    logits_MV = lean.logits(hidden_MD)
    if factor != 1:
        logits_MV = RepetitionPenalty(factor, seen_V)(logits_MV, tree, above_MM)
    decision_2 = verifier.decide(VerifyContext(tree, logits_MV, _NOBODY, dice, tables))
    if len(dice):  # a sum over a vocabulary may round otherwise on another GPU, and then the caches would part
        decision_2 = lean.ranks.first(decision_2)
    if len(parents) > 1:
        move_of(cache.stores[-1], paths, state_2, decision_2[:1])
    return (torch.cat([decision_2, tokens_M]),)


def pass_of(lean: LeanText, number: int, cache: KVCache, paths: Paths, state_2: Tensor, rows: Tensor) -> tuple[Tensor]:
    """A tree through one stage. rows: its tokens (M,), or (M, D) as they left the stage before."""
    x = lean.enter(rows) if number == 0 else rows
    return (
        lean.run(number, x, paths.depths_M, 0, Sight(None, paths.nodes_MD, paths.depths_M), state_2[:1], state_2[1:], cache),
    )


def move_of(store: Store, paths: Paths, state_2: Tensor, last_1: Tensor) -> tuple[()]:
    """The rows on the way to node `last` move together behind the root's."""
    store.move(state_2[:1], paths.nodes_MD.index_select(0, last_1)[0])
    return ()
