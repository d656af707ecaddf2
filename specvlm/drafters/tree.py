"""Draft a static tree with a small model that sees the pruned video (SpecVLM, section 3; the tree is EAGLE-1's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.strategy import DraftContext, Drafter, DraftSession
from specvlm.types import DraftTree, TreeShape, Verdict, ancestor_mask

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


@dataclass(frozen=True)
class TreeDrafter(Drafter):
    """A tree of fixed shape, one forward pass of the draft model a level.

    Node i is the rank[i]-th best token of the draft below the way from the root to its parent; a node sees the prompt, the
    answer so far, its ancestors and itself. All nodes of a depth that have children are expanded in one pass.

    SpecVLM (arXiv 2508.16201), which drafts from the pruned video with EAGLE-1's tree of 25 guesses (mc_sim_7b_63 in EAGLE's
    code): 4, 8, 8, 3 and 2 by depth. Deviations: none.

    shape: `paper` (25 guesses), `chain:5`, `4x2x1`, a literal `[[0],[1],[0,0]]` or a .json file of one.
    children: `top` takes each node's best tokens; `sample` draws them without replacement from the draft's
    distribution, warped as the verifier's; `auto` samples when the verifier does. Both are exact under every verifier.
    Cost: depth passes a round (5 for the paper's tree); the KV of accepted nodes is kept, not recomputed. ValueError for a
    shape or children of other forms.
    """

    name = "tree"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    model = "draft"
    tells = True
    shape: str = "paper"
    children: str = "auto"

    def __post_init__(self) -> None:
        TreeShape.parse(self.shape)
        if self.children not in ("auto", "top", "sample"):
            raise ValueError(f"children={self.children!r} is none of auto, top, sample")

    @property
    def max_nodes(self) -> int:
        return len(TreeShape.parse(self.shape))

    def start(self, ctx: DraftContext) -> DraftSession:
        model = ctx.target if self.model == "target" else ctx.draft
        assert model is not None
        shape = TreeShape.parse(self.shape)
        widest = max(shape.ranks) + 1
        if widest > ctx.vocabulary:
            raise UserError(f"drafter.shape={self.shape} asks {widest} guesses of a node, there are {ctx.vocabulary} tokens")
        sample = self.children == "sample" or (self.children == "auto" and ctx.sampling.temperature > 0)
        if self.children == "sample" and ctx.sampling.temperature == 0:
            raise UserError("drafter.children=sample needs a verifier that samples: use verifier=sampling, or children=auto")
        engine, ranks = ctx.engine or Engine(), ctx.target.ranks
        if model.ranks.size == ranks.size:
            return engine.tree_session(ctx, model, shape, sample)
        session = engine.tree_session(ctx, model, shape, sample) if ranks.rank == 0 else None
        return ToldSession(session, ctx, shape, sample)


@dataclass(frozen=True)
class Level:
    """One pass: the nodes expanded in it, what each sees of the expanded rows so far, and where its children go."""

    nodes: tuple[int, ...]
    seen: Tensor | None
    children: Tensor  # (C,) tree nodes filled from this pass
    rows: Tensor  # (C,) which row of the pass is the parent
    ranks: Tensor  # (C,) which of the parent's guesses
    orders: Tensor  # (C,) place among the siblings


class Plan:
    """Everything about a shape that does not depend on tokens."""

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        mask = ancestor_mask(shape.parents)
        written: list[int] = []
        self.levels: list[Level] = []
        for depth, nodes in enumerate(shape.levels):
            written += nodes if depth else []
            below = [(child, row, order) for row, n in enumerate(nodes) for order, child in enumerate(shape.children[n])]
            children, rows, orders = torch.tensor(below).unbind(1)
            ranks = torch.tensor([shape.ranks[c] for c in children.tolist()])
            seen = mask[list(nodes)][:, written] if depth else None
            if seen is not None and bool(seen.all()):
                seen = None  # a chain: the only row sees everything, and attention without a mask is faster
            self.levels.append(Level(nodes, seen, children, rows, ranks, orders))
        self.order = written  # tree node of each row behind the root's

    @cached_property
    def row_of(self) -> dict[int, int]:
        """Slot of an expanded node, counted from the root's."""
        return {0: 0} | {node: row for row, node in enumerate(self.order, start=1)}


def draw(q_QV: Tensor, race_QV: Tensor, count: int) -> Tensor:
    """(Q, count) ids drawn without replacement: exponential races, the smallest arrival time first (Gumbel top-k)."""
    return (race_QV / q_QV.double()).topk(count, largest=False).indices  # q = 0 never arrives: it comes last, as inf


class PrunedSession(DraftSession):
    """A draft model's own cache: pruned prompt, then accepted tokens; a tree's rows come and go behind them.

    rows: most of them behind an accepted token that a round writes.
    """

    def __init__(self, ctx: DraftContext, model: VideoLM, rows: int) -> None:
        self.ctx, self.model = ctx, model
        self.pending = [ctx.bonus]  # committed tokens whose rows are not in the cache yet; the last is the next root
        self.base = 0  # slot of the current root
        prompt, keep = ctx.prompt, ctx.keep
        features = ctx.features_ND if ctx.features_ND is not None and model is ctx.target else model.features(prompt, keep)
        embeds, positions = model.pruned(prompt, features, keep, ctx.positions)
        self.cache = ctx.caches.take("draft", model, len(embeds) + ctx.max_new_tokens + rows + 2)
        model.prefill(embeds, positions, self.cache)

    def _root(self) -> Tensor:
        """(1, V) logits below the new root: a pass over what is pending, which it ends."""
        rows = len(self.pending)
        seen = torch.ones(rows, rows, dtype=torch.bool).tril() if rows > 1 else None
        logits = self.model.append(torch.tensor(self.pending), range(rows), seen, self.cache)[-1:]
        self.base = self.cache.length - 1
        return logits[:, : self.ctx.vocabulary]

    def _settle(self, last: Verdict, tokens: Tensor, row_of: Mapping[int, int]) -> None:
        """Keep the rows of accepted nodes that were expanded; what else was accepted is fed with the next root."""
        expanded = [node for node in last.path if node in row_of]
        self.cache.keep(self.base, [row_of[node] for node in expanded])
        left: Sequence[int] = last.path[len(expanded) :]
        self.pending = [*tokens[list(left)].tolist(), last.bonus]


class TreeSession(PrunedSession):
    """A static tree, level by level."""

    def __init__(self, ctx: DraftContext, model: VideoLM, shape: TreeShape, sample: bool) -> None:
        self.sample = sample
        self.plan = Plan(shape)
        # Drawn where the logits are, seeded from the request's own generator.
        seed = int(torch.randint(2**62, (), generator=ctx.generator)) if sample else 0
        self.generator = torch.Generator(model.head_device).manual_seed(seed)
        self.tokens = torch.zeros(len(shape), dtype=torch.int64)
        super().__init__(ctx, model, len(shape))

    def propose(self, last: Verdict | None) -> DraftTree:
        if last is not None:
            self._settle(last, self.tokens, self.plan.row_of)
        plan, cache, model = self.plan, self.cache, self.model
        shape = plan.shape
        q: Tensor | None = None
        self.tokens = torch.zeros(len(shape), dtype=torch.int64, device=model.head_device)
        self.tokens[0] = self.pending[-1]
        for depth, level in enumerate(plan.levels):
            if depth == 0:
                logits = self._root()
            else:
                logits = model.append(self.tokens[list(level.nodes)], [depth] * len(level.nodes), level.seen, cache, self.base)
                logits = logits[:, : self.ctx.vocabulary]
            if not self.sample:
                best = logits.topk(int(level.ranks.max()) + 1).indices
                self.tokens[level.children] = best[level.rows, level.ranks]
            else:
                q_rows = self.ctx.sampling.probabilities(logits)
                q = q_rows.new_zeros(len(shape), q_rows.shape[1]) if q is None else q
                q[list(level.nodes)] = q_rows
                race = torch.empty(q_rows.shape, dtype=torch.float64, device=q_rows.device)
                best = draw(q_rows, race.exponential_(generator=self.generator), int(level.orders.max()) + 1)
                self.tokens[level.children] = best[level.rows, level.orders]
        return DraftTree(self.tokens, shape.parents, q, ranks=shape.ranks)


class ToldSession(DraftSession):
    """The session of a draft that lies on the first rank alone: that one drafts, and tells the others its tree."""

    def __init__(self, session: DraftSession | None, ctx: DraftContext, shape: TreeShape, sample: bool) -> None:
        self.session, self.ranks, self.device, self.shape = session, ctx.target.ranks, ctx.target.device, shape
        if session is None and sample:
            torch.randint(2**62, (), generator=ctx.generator)  # as the session seeds itself: the generators stay alike
        wide = torch.promote_types(ctx.target.dtype, torch.float32)
        self.tokens = torch.zeros(len(shape), dtype=torch.int64, device=self.device)
        self.q = torch.zeros(len(shape), ctx.vocabulary, dtype=wide, device=self.device) if sample else None

    def propose(self, last: Verdict | None) -> DraftTree:
        tree = DraftTree(self.tokens, self.shape.parents, self.q, ranks=self.shape.ranks)
        if self.session is not None:
            tree = self.session.propose(last).to(self.device)
            if self.q is not None and tree.q is not None:  # the others do not know the draft's dtype
                tree = replace(tree, q=tree.q.to(self.q.dtype))
        for tensor in (tree.tokens, tree.q):
            if tensor is not None:
                self.ranks.first(tensor)
        return tree
