"""A tree's check as functions of device tensors, for capture: target pass, acceptance rule, and cache compaction.

Shape suffixes: M tree nodes, D nodes on the longest path (of hidden states: their width), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from specvlm.engine.lean import LeanText, Place, Sight
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import KVCache, Store
from specvlm.strategies import Verifier, VerifyContext
from specvlm.strategies.verifier import decision_of
from specvlm.types import DraftTree

_NOBODY = torch.Generator()  # unused: a captured step gets its random numbers as inputs


def ways(tree: DraftTree) -> list[list[int]]:
    """List the nodes on each node's path from the root, padded to the longest path.

    Padding at position i is i, so that moving rows along the path leaves those past its end in place.
    """
    length = max(tree.depths) + 1
    return [[*way, *range(len(way), length)] for way in map(tree.way_to, range(len(tree)))]


class Paths(NamedTuple):
    """A tree's paths as tables on the device.

    As inputs of a captured step, paths are padded to M nodes, so that every tree of M nodes has the same shapes.

    Attributes:
        nodes_MD: (M, D) nodes on the path from the root to each node (see `ways`).
        depths_M: (M,) depth of each node.
        seen_MM: (M, M) int8 tree mask.
    """

    nodes_MD: Tensor
    depths_M: Tensor
    seen_MM: Tensor

    @classmethod
    def of(cls, tree: DraftTree, device: torch.device) -> Self:
        nodes, depths = (torch.tensor(table, device=device) for table in (ways(tree), tree.depths))
        return cls(nodes, depths, tree.mask.to(device, torch.int8))


def shape_of(tree: DraftTree, verifier: Verifier) -> tuple[Tensor, ...]:
    """Encode a varying tree's shape as host tensors, for a step that is captured once per number of nodes.

    Empty for a fixed tree, whose shape is captured on its own, and for a verifier without tables, which checks varying
    trees uncaptured.
    """
    tables = verifier.tables(tree.parents) if tree.varies else None
    if tables is None:
        return ()
    paths = Paths.of(tree, torch.device("cpu"))
    further = torch.arange(paths.nodes_MD.shape[1], len(tree)).expand(len(tree), -1)
    return (torch.cat([paths.nodes_MD, further], 1), *paths[1:], *tables)


def check_of(
    lean: LeanText,
    verifier: Verifier,
    sampled: bool,
    parents: tuple[int, ...],
    varies: bool,
    cache: KVCache,
    factor: float,
    paths: Paths,
    state_4: Tensor,
    tokens_M: Tensor,
    seen_V: Tensor,
    dice: Tensor,
    q_MV: Tensor,
    x_MD: Tensor,
    *shape: Tensor,
) -> tuple[Tensor]:
    """Run a tree through the last stage, apply penalty and rule, and compact that stage's cache, all on its device.

    Args:
        lean: The target's lean pass.
        verifier: Acceptance rule.
        sampled: Whether the rule samples; ranks then take rank 0's decision.
        parents: (M,) parents of the tree, or of any tree of its size if `shape` is given.
        varies: Whether the drafter's trees vary in shape.
        cache: The target's KV cache.
        factor: Repetition penalty.
        paths: Tables of `parents`.
        state_4: Slot of the root, position minus slot, and the key of a coupled rule's noise (`VerifyContext.key_2`).
        tokens_M: (M,) tokens of the tree, root included.
        seen_V: (V,) bool, True for tokens of the prompt and the output; empty without a penalty.
        dice: Uniform random numbers, as many as `Verifier.dice` returns.
        q_MV: (M, V) draft distributions; may be empty.
        x_MD: (M, D) hidden states from the stage before; empty if there is only one stage.
        shape: Tables of this tree (see `shape_of`), which replace those of `parents`; may be empty.

    Returns:
        (M + 2,) last accepted node, bonus token and the M tokens, as one tensor, so that the host reads once.
    """
    state_2, key_2 = state_4[:2], state_4[2:]
    tree, tables, above_MM = DraftTree(tokens_M, parents, q_MV if len(q_MV) else None, varies), None, None
    if shape:
        paths, tables = Paths(*shape[:3]), shape[3:]
        above_MM = paths.seen_MM.float()
    (hidden_MD,) = pass_of(lean, len(lean.stages) - 1, cache, paths, state_2, x_MD if len(x_MD) else tokens_M)
    logits_MV = lean.logits(hidden_MD)
    if factor != 1:
        logits_MV = RepetitionPenalty(factor, seen_V)(logits_MV, tree, above_MM)
    decision_2 = decision_of(verifier, VerifyContext(tree, logits_MV, _NOBODY, dice, tables, key_2=key_2))
    if sampled:  # sums over the vocabulary may round differently on two GPUs: their caches would diverge
        decision_2 = lean.ranks.first(decision_2)
    if len(parents) > 1:
        move_of(cache.stores[-1], paths, state_2, decision_2[:1])
    return (torch.cat([decision_2, tokens_M]),)


def pass_of(lean: LeanText, number: int, cache: KVCache, paths: Paths, state_2: Tensor, rows: Tensor) -> tuple[Tensor]:
    """Run a tree through one stage; returns (M, D) hidden states.

    rows: (M,) tokens for the first stage, else (M, D) hidden states from the stage before.
    """
    x = lean.enter(rows) if number == 0 else rows
    place = Place(cache, state_2[:1], 0, Sight(None, paths.nodes_MD, paths.depths_M))
    return (lean.run(number, x, state_2[:1] + state_2[1:] + paths.depths_M, place),)


def move_of(store: Store, paths: Paths, state_2: Tensor, last_1: Tensor) -> tuple[()]:
    """Compact one stage's cache: move the rows on the path to node `last_1` next to each other, root first."""
    store.move(state_2[:1], paths.nodes_MD.index_select(0, last_1)[0])
    return ()
