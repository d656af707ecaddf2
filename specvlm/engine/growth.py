"""A grown tree's whole round as one program: its shape is data, so one capture serves every round of an extent.

Shape suffixes: D levels of the deepest tree and its root, W nodes expanded on a level, R rows below the root.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.cache import KVCache
from specvlm.drafters.dynamic_tree import GrownSession, GrownTreeDrafter, Growth, grow, unpacked
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
    on the accepted way. A program serves one extent, and is captured when a round first asks for it.
    """

    def __init__(
        self, ctx: DraftContext, model: VideoLM, drafter: GrownTreeDrafter, lean: LeanText, engine: GraphsEngine
    ) -> None:
        super().__init__(ctx, model, drafter)
        self.lean, self.engine = lean, engine
        self.deepest = max(depth for depth, _ in drafter.extents())
        self.root = self.cache.length - 1  # slot of the last root; before the first round, of the prompt's last token
        self.last = int(ctx.prompt.tokens[-1])
        self.guesses: list[int] = []
        self.rows: list[int] = []
        self.programs = {self.pace.extent: self._program(self.pace.extent, "draft_prefill")}

    def _program(self, extent: tuple[int, int], part: str) -> Program:
        growth = self.drafter.growth(*extent)
        key = ("grown", self.lean, growth, self.deepest, self.ctx.vocabulary)
        return self.engine.drafting(self.ctx, key, self.cache, partial(self._build, growth), part)

    def _build(self, growth: Growth, backend: str) -> Program:
        """Warmed up behind the last root, which is fed again: all that is written there is still free."""
        device = self.model.device
        inputs = [
            torch.tensor([self.root, 0, self.last, 0, self.cache.offset], device=device),
            torch.arange(self.deepest + 1, device=device),
        ]
        fn = partial(_round, self.lean, self.cache, self.ctx.vocabulary, growth)
        return self.engine.capture(fn, inputs, backend, None)

    def propose(self, last: Verdict | None) -> DraftTree:
        path, bonus = ((0,), self.ctx.bonus) if last is None else (last.path, last.bonus)
        if last is not None:
            self.pace.went(last.accepted, self.confidence)
            self.last = self.guesses[path[-1]]
        # What was never expanded is fed again, so any row will do; behind its end a way goes straight on.
        way, below = [self.rows[node] if node and self.rows[node] >= 0 else at for at, node in enumerate(path)], len(path) - 1
        way += range(len(way), self.deepest + 1)
        if self.pace.extent not in self.programs:
            way, below = self._moved(way, below), 0  # a capture writes behind the root, where the accepted rows may lie
            self.programs[self.pace.extent] = self._program(self.pace.extent, "draft")
        state = (self.root, below, self.last, bonus, self.cache.offset)
        (packed,) = self.programs[self.pace.extent](state, way)
        # The one read of a round's draft.
        self.guesses, parents, self.rows, self.confidence = unpacked(packed.tolist())
        self.root += below + 1
        return DraftTree(packed[: len(parents)], parents, varies=True)

    def _moved(self, way: list[int], below: int) -> list[int]:
        """Moves accepted rows together ahead of the program; gives the way that is left to it."""
        device = self.model.device
        self.cache.stores[0].move(torch.tensor([self.root], device=device), torch.tensor(way, device=device))
        self.root += below
        return list(range(self.deepest + 1))


def _round(lean: LeanText, cache: KVCache, vocabulary: int, growth: Growth, state_5: Tensor, way_D: Tensor) -> tuple[Tensor]:
    """state: slot of the last root, depth of the accepted node below it, that node's token, the bonus, position - slot. way:
    the rows on the way to that node, counted from the last root's. Returns what was grown, packed.
    """
    root, below, old, bonus, offset = state_5.split(1)
    cache.stores[0].move(root, way_D)
    base = root + below
    device = state_5.device
    fed_seen = torch.ones(2, 2, dtype=torch.int8, device=device).tril()
    steps = torch.arange(len(growth.columns) + 1, device=device)
    hidden = lean(torch.cat([old, bonus]), steps[:2], 0, fed_seen, base, offset, cache)[-1:]

    def expand(tokens_W: Tensor, level: int, seen_WR: Tensor) -> Tensor:
        fed = torch.ones(len(tokens_W), 2, dtype=torch.int8, device=device)
        seen = torch.cat([fed, seen_WR.to(torch.int8)], 1)
        at = 2 + sum(growth.rows[: level - 1])
        hidden = lean(tokens_W, steps[level + 1].expand(len(tokens_W)), at, seen, base, offset, cache)
        return lean.logits(hidden)[:, :vocabulary]

    return (grow(bonus, lean.logits(hidden)[:, :vocabulary], growth, expand).packed(),)
