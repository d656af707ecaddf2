"""A static tree's whole expansion as one program: what was accepted moves together, the new root is fed, levels follow.

Shape suffixes: M tree nodes, Q rows of a pass, D nodes on the longest path, R rows of random numbers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specvlm.cache import KVCache
from specvlm.drafters.tree import Plan, TreeSession, draw
from specvlm.engine.lean import LeanText
from specvlm.engine.program import Program
from specvlm.strategy import DraftContext, Sampling
from specvlm.types import DraftTree, TreeShape, Verdict

if TYPE_CHECKING:
    from specvlm.engine.graphs import GraphsEngine
    from specvlm.models.video_lm import VideoLM


def ways(tree: DraftTree, row_of: Callable[[int, int], int]) -> list[list[int]]:
    """For each node the rows (row_of a node and its depth) on its way from the root. Behind its end a way goes straight on, so
    that rows moved along it stay where they are.
    """
    length = max(tree.depths) + 1
    ways = [tree.way_to(node) for node in range(len(tree))]
    return [[*(row_of(n, depth) for depth, n in enumerate(way)), *range(len(way), length)] for way in ways]


class CapturedTree(TreeSession):
    """A `TreeSession` whose rounds are one program each: commit what was accepted, feed the next root, expand level by level.

    The last accepted node is always fed again with the new root: its row may be missing (a leaf is never expanded), and a
    pass of two rows costs what one of one row costs.
    """

    def __init__(
        self, ctx: DraftContext, model: VideoLM, shape: TreeShape, sample: bool, lean: LeanText, engine: GraphsEngine
    ) -> None:
        super().__init__(ctx, model, shape, sample)
        self.lean, self.engine = lean, engine
        self.root = self.cache.length - 1  # slot of the last root; before the first round, of the prompt's last token
        key = ("draft", lean, shape, ctx.vocabulary, ctx.sampling if sample else None)
        self.program = engine.drafting(ctx, key, self.cache, self._build)
        self.races = self.program.inputs[2] if sample else None
        self.tokens = torch.full((len(shape),), int(ctx.prompt.tokens[-1]), device=model.device)

    def _build(self, backend: str) -> Program:
        """Warmed up behind the prompt, whose last row the first round feeds again: all that is written there is still free."""
        device, count = self.model.device, len(self.plan.shape)
        levels = sum(len(level.nodes) for level in self.plan.levels)
        races = (levels, self.ctx.vocabulary) if self.sample else (0,)
        inputs = [
            torch.tensor([self.root, 0, 0, self.cache.offset], device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.ones(races, dtype=torch.float64, device=device),
        ]
        rows = _Rows(self.plan, self.sample, device)
        fn = partial(_expand, self.lean, rows, self.cache, self.ctx.vocabulary, self.sample, self.ctx.sampling)
        return self.engine.capture(fn, inputs, backend, rows)

    def propose(self, last: Verdict | None) -> DraftTree:
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        if self.races is not None:
            self.races.exponential_(generator=self.generator)
        self.tokens, q_MV = self.program((self.root, node, bonus, self.cache.offset), self.tokens, None)
        self.root += self.plan.shape.depths[node] + 1
        shape = self.plan.shape
        return DraftTree(self.tokens, shape.parents, q_MV if self.sample else None, ranks=shape.ranks)


class _Level(NamedTuple):
    """A pass: tree nodes, their positions above the fed rows', slot of the first, what they see (None: the two fed rows),
    guesses of a node, and for each child its tree node, its parent's row, which guess it is, and of which draw.
    """

    nodes: Tensor
    depths: Tensor
    at: int
    seen: Tensor | None
    widest: int
    children: Tensor
    parents: Tensor
    ranks: Tensor
    orders: Tensor


class _Rows:
    """A plan's tables on the device. Rows: the two that are fed, then each level's expanded nodes below the root."""

    def __init__(self, plan: Plan, sample: bool, device: torch.device) -> None:
        shape = plan.shape
        # Where a node was written, counted from the root; what was never expanded is fed again, so any row will do.
        rows = ways(DraftTree(torch.empty(0), shape.parents), plan.row_of.get)
        self.rows_MD = torch.tensor(rows, device=device)
        self.depths_M = torch.tensor(shape.depths, device=device)
        self.feed_depths = torch.tensor([0, 1], device=device)
        self.feed_seen = torch.ones(2, 2, dtype=torch.int8, device=device).tril()
        self.levels: list[_Level] = []
        before = 2
        for depth, level in enumerate(plan.levels):
            nodes = torch.tensor(level.nodes, device=device)
            depths = torch.full_like(nodes, depth + 1)
            seen = None
            if depth:
                seen = torch.ones(len(level.nodes), before + len(level.nodes), dtype=torch.int8)
                if level.seen is not None:
                    seen[:, 2:] = level.seen
                seen = seen.to(device)
            tables = [t.to(device) for t in (level.children, level.rows, level.ranks, level.orders)]
            widest = int((level.orders if sample else level.ranks).max()) + 1
            self.levels.append(_Level(nodes, depths, before, seen, widest, *tables))
            before += len(level.nodes) if depth else 0


def _expand(
    lean: LeanText,
    rows: _Rows,
    cache: KVCache,
    vocabulary: int,
    sample: bool,
    sampling: Sampling,
    state_4: Tensor,
    old_M: Tensor,
    races_RV: Tensor,
) -> tuple[Tensor, Tensor]:
    """state: slot of the last root, accepted node, bonus token, position - slot. Returns tokens (M,) and q (M, V) or (0,)."""
    root, node, bonus, offset = state_4.split(1)
    cache.stores[0].move(root, rows.rows_MD.index_select(0, node)[0])
    base = root + rows.depths_M[node]
    tokens_M = torch.zeros_like(old_M)
    tokens_M[:1] = bonus
    wide = torch.promote_types(lean.dtype, torch.float32)
    q_MV = races_RV.new_zeros((len(old_M), vocabulary) if sample else (0,), dtype=wide)
    done = 0
    for level in rows.levels:
        if level.seen is None:
            fed = torch.cat([old_M[node], bonus])
            hidden = lean(fed, rows.feed_depths, 0, rows.feed_seen, base, offset, cache)[-1:]
        else:
            hidden = lean(tokens_M[level.nodes], level.depths, level.at, level.seen, base, offset, cache)
        logits_QV = lean.logits(hidden)[:, :vocabulary]
        if sample:
            q_QV = sampling.probabilities(logits_QV)
            q_MV.index_copy_(0, level.nodes, q_QV)
            best = draw(q_QV, races_RV[done : done + len(level.nodes)], level.widest)
            done += len(level.nodes)
            tokens_M.index_copy_(0, level.children, best[level.parents, level.orders])
        else:
            best = lean.ops.top(logits_QV, level.widest)
            tokens_M.index_copy_(0, level.children, best[level.parents, level.ranks])
    return tokens_M, q_MV
