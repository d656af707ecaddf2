"""Grow a draft tree level by level and cut it back to its best nodes, on the device only.

Shape suffixes: W nodes expanded on a level, R rows written below the root so far, C candidates (the root is number 0),
M tree nodes, K best tokens, V vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specvlm.models.passes import Passes, driven


@dataclass(frozen=True)
class Growth:
    """Sizes and thresholds of a tree, known before the first pass, so that one captured program serves every round.

    A drafter's rule, given by `shares` and `least`, marks candidates as inner or open. Inner nodes belong to the tree,
    even as leaves. Open nodes are the inner nodes that get children. The root is both. `rows` and `step` are fixed, so
    if the rule marks fewer nodes, the most probable other candidates fill the gap.

    Attributes:
        columns: Maximum number of children of a node, per level.
        rows: Number of nodes expanded, per level but the last. Open nodes come first, then the most probable others.
        nodes: Maximum number of guesses kept. Inner nodes come first, then the most probable others.
        shares: A number s per level. Of an open node reached with probability P, the first
            max(1, floor(s * (0.5 + P))) children are inner. Empty: all children of open nodes are.
        least: Probability P that an open node must exceed, per level but the last. Empty: all inner nodes are open.
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


class Grown(NamedTuple):
    """A grown tree as tensors, of which only the first `count_1` nodes are valid.

    Attributes:
        tokens_M: Token of each node.
        parents_M: Parent of each node; -1 for the root.
        rows_M: Cache row of each node, counted from the root's; -1 if the node was not expanded.
        count_1: Number of nodes, root included.
        confidence_1: The draft's confidence below the root (`Growth.top`), float64.
    """

    tokens_M: Tensor
    parents_M: Tensor
    rows_M: Tensor
    count_1: Tensor
    confidence_1: Tensor

    def packed(self) -> Tensor:
        """Pack the tree into (3 M + 2,) integers, tokens first, so that the host reads all of it in one transfer."""
        confidence = self.confidence_1.double().view(torch.int64)
        return torch.cat([self.tokens_M, self.parents_M, self.rows_M, self.count_1, confidence])


def unpacked(integers: list[int]) -> tuple[list[int], tuple[int, ...], list[int], float]:
    """Unpack the integers of `Grown.packed` to the valid nodes' tokens, parents and rows, and the confidence."""
    *nodes, count, bits = integers
    most = len(nodes) // 3
    tokens, parents, rows = (nodes[start : start + count] for start in range(0, 3 * most, most))
    return tokens, tuple(parents), rows, struct.unpack("d", struct.pack("q", bits))[0]


def grow(root_1: Tensor, logits_1V: Tensor, growth: Growth, expand: Callable[[Tensor, int, Tensor], Any]) -> Passes[Grown]:
    """Grow a tree below a root token and cut it back, without reading a tensor on the host.

    `Growth` defines inner and open nodes. A pass has a fixed number of rows. With fewer open nodes than rows, the most
    probable other candidates are expanded too, since unused rows would cost as much. Likewise, the most probable other
    candidates fill the tree up to the next multiple of `growth.step` nodes.

    Args:
        root_1: Token of the root.
        logits_1V: Logits of the token after the root.
        growth: Sizes and thresholds of the tree.
        expand: Called with tokens (W,), their depth, and a mask (W, R) of the rows below the root that each sees, its
            own included. Returns logits (W, V), or a generator of passes that returns them.

    Returns:
        The tree after the cut.
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

    k is `top`, or the vocabulary if that is smaller. The confidence is 1 for k < 2, and 0 if the logits give no
    distribution, since a bad draft must not stop a request.
    """
    count = min(top, logits_1V.shape[-1])
    if count < 2:
        return logits_1V.new_ones(1, dtype=torch.float64)
    p_1K = logits_1V.topk(count).values.double().softmax(-1)
    return (1 - torch.special.entr(p_1K).sum(-1) / math.log(count)).nan_to_num(nan=0.0)
