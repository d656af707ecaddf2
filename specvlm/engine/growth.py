"""A grown tree's whole round as one program: its shape is data, so one capture serves every round.

Shape suffixes: M tree nodes, D levels of the tree and its root, W nodes expanded on a level, R rows below the root.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.cache import KVCache
from specvlm.drafters.dynamic_tree import GrownSession, GrownTreeDrafter, grow
from specvlm.engine.lean import LeanText
from specvlm.engine.program import Program
from specvlm.strategy import DraftContext
from specvlm.types import DraftTree, Verdict

if TYPE_CHECKING:
    from specvlm.engine.graphs import GraphsEngine
    from specvlm.models.video_lm import VideoLM


class CapturedGrowth(GrownSession):
    """A `GrownSession` whose rounds are one program each, as `CapturedTree`'s are: what was accepted moves together, the last
    accepted node is fed again with the new root, the tree is grown and cut. The host reads the shape, and writes back the rows
    on the accepted way.
    """

    def __init__(
        self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter, lean: LeanText, engine: GraphsEngine
    ) -> None:
        super().__init__(ctx, model, drafter)
        self.lean, self.engine = lean, engine
        ((self.depth, self.width),) = drafter.extents()
        self.root = self.cache.length - 1  # slot of the last root; before the first round, of the prompt's last token
        self.last = int(ctx.prompt.tokens[-1])
        self.guesses: list[int] = []
        self.rows: list[int] = []
        key = ("grown", lean, self.depth, self.width, drafter.nodes, ctx.vocabulary)
        self.program = engine.drafting(ctx, key, self.cache, self._build)

    def _build(self, backend: str) -> Program:
        """Warmed up behind the prompt, whose last row the first round feeds again: all that is written there is still free."""
        device = self.model.device
        inputs = [
            torch.tensor([self.root, 0, self.last, 0, self.cache.offset], device=device),
            torch.arange(self.depth + 1, device=device),
        ]
        fn = partial(_round, self.lean, self.cache, self.ctx.vocabulary, self.depth, self.width, self.drafter.nodes)
        return self.engine.capture(fn, inputs, backend, None)

    def propose(self, last: Verdict | None) -> DraftTree:
        path, bonus = ((0,), self.ctx.bonus) if last is None else (last.path, last.bonus)
        if last is not None:
            self.last = self.guesses[path[-1]]
        # What was never expanded is fed again, so any row will do; behind its end a way goes straight on.
        way = [self.rows[node] if node and self.rows[node] >= 0 else at for at, node in enumerate(path)]
        way += range(len(way), self.depth + 1)
        state = (self.root, len(path) - 1, self.last, bonus, self.cache.offset)
        (grown_3M,) = self.program(state, way)
        self.guesses, parents, self.rows = grown_3M.tolist()  # the one read of a round's draft
        self.root += len(path)
        return DraftTree(grown_3M[0], tuple(parents), varies=True)


def _round(
    lean: LeanText, cache: KVCache, vocabulary: int, depth: int, width: int, nodes: int, state_5: Tensor, way_D: Tensor
) -> tuple[Tensor]:
    """state: slot of the last root, depth of the accepted node below it, that node's token, the bonus, position - slot. way:
    the rows on the way to that node, counted from the last root's. Returns tokens, parents and rows, (3, M).
    """
    root, below, old, bonus, offset = state_5.split(1)
    cache.stores[0].move(root, way_D)
    base = root + below
    device = state_5.device
    fed_seen = torch.ones(2, 2, dtype=torch.int8, device=device).tril()
    steps = torch.arange(depth + 1, device=device)
    hidden = lean(torch.cat([old, bonus]), steps[:2], 0, fed_seen, base, offset, cache)[-1:]

    def expand(tokens_W: Tensor, level: int, seen_WR: Tensor) -> Tensor:
        fed = torch.ones(len(tokens_W), 2, dtype=torch.int8, device=device)
        seen = torch.cat([fed, seen_WR.to(torch.int8)], 1)
        at = 2 + (level - 1) * width
        hidden = lean(tokens_W, steps[level + 1].expand(len(tokens_W)), at, seen, base, offset, cache)
        return lean.logits(hidden)[:, :vocabulary]

    grown = grow(bonus, lean.logits(hidden)[:, :vocabulary], depth, width, nodes, expand)
    return (torch.stack(grown),)
