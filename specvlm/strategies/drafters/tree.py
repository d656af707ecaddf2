"""Draft a static tree with a model that sees the pruned video (SpecVLM, section 3; the default tree is EAGLE-1's).

Shape suffixes: M tree nodes, Q rows of a pass, T slots that they may attend to, R nodes that are expanded, C children,
D nodes on the longest path, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass, Passes, Routine, Work
from specvlm.process.memo import remembered
from specvlm.strategies import DraftContext, Drafter, DraftSession, Sampling, gumbel
from specvlm.types import DraftTree, TreeShape, Verdict, ancestor_mask

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


@dataclass(frozen=True)
class TreeDrafter(Drafter):
    """A tree of fixed shape, with one forward pass of the draft model per level.

    With the best tokens as children, node i is number rank[i], counted from 0, of the draft's best tokens after the
    path from the root to its parent. A node attends to the pruned prompt, the answer so far, its ancestors and itself.
    One pass expands all nodes of one depth that have children.

    SpecVLM (arXiv 2508.16201), which drafts from the pruned video with EAGLE-1's tree of 25 guesses (mc_sim_7b_63 in
    EAGLE's code): 4, 8, 8, 3 and 2 guesses by depth. Deviations: none.

    Cost: one pass per level and round (5 for the paper's tree). Keys and values of accepted nodes are reused. Those of
    the last accepted node are computed again, in the pass of the next root, if it was a leaf or the engine captures.

    Attributes:
        shape: `paper` (25 guesses), `chain:5`, `4x2x1`, a literal `[[0],[1],[0,0]]` or a .json file with such a list.
        children: `top` takes each node's best tokens; `sample` draws them without replacement from the draft's
            distribution, warped like the verifier's; `auto` goes by the verifier: it samples for `sampling`, takes the
            best tokens by score with the shared noise for `coupled`, and the best tokens for others. The output is
            exact under every lossless verifier.

    Raises:
        ValueError: The shape is malformed, or `children` is unknown.
    """

    name = "tree"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    model = "draft"
    shape: str = "paper"
    children: str = "auto"

    def __post_init__(self) -> None:
        TreeShape.parse(self.shape)
        if self.children not in ("auto", "top", "sample"):
            raise ValueError(f"children={self.children!r} is none of auto, top, sample")

    @property
    def max_nodes(self) -> int:
        return len(TreeShape.parse(self.shape))

    @property
    def fixed(self) -> TreeShape:
        return TreeShape.parse(self.shape)

    def start(self, ctx: DraftContext) -> TreeSession:
        shape = self.fixed
        widest = max(shape.ranks) + 1
        if widest > ctx.vocabulary:
            raise UserError(f"drafter.shape={self.shape} asks {widest} guesses of a node, there are {ctx.vocabulary} tokens")
        rule = None if self.children == "top" or not ctx.sampling.temperature else ctx.sampling
        if self.children == "sample" and ctx.sampling.temperature == 0:
            raise UserError("drafter.children=sample needs a verifier that samples: use verifier=sampling, or children=auto")
        if rule is not None and self.children == "sample":
            rule = replace(rule, coupled=False)
        return TreeSession(ctx, drafting_model(ctx, self.model), shape, rule)


def draw(q_QV: Tensor, race_QV: Tensor, count: int) -> Tensor:
    """Draw (Q, count) ids without replacement by exponential races (Gumbel top-k).

    Args:
        q_QV: Distribution of each row.
        race_QV: Exponential random numbers, float64.
        count: Number of ids per row. They are returned in the order drawn.
    """
    return (race_QV / q_QV.double()).topk(count, largest=False).indices  # ids with q = 0 come last, as inf


def drafting_model(ctx: DraftContext, which: str | None) -> VideoLM:
    """Return the model that a drafter runs, by its attribute `model`, "draft" or "target"."""
    model = ctx.target if which == "target" else ctx.draft
    assert model is not None
    return model


class PrunedSession(DraftSession):
    """Session with a KV cache of its own: the pruned prompt, then accepted tokens, then the rows of the current tree.

    A round compacts the accepted rows, then feeds the last accepted node of the old tree and the new root. The former
    is fed again because its row may be missing (leaves are not expanded); on a GPU two rows cost as much as one. Where
    routines are not captured, `TreeSession` feeds the root alone if that row is there.

    Args:
        ctx: Context of the request.
        model: The model that drafts.
        rows: Maximum number of rows that a round writes, the last accepted node's aside.
    """

    def __init__(self, ctx: DraftContext, model: VideoLM, rows: int) -> None:
        self.ctx, self.model, self.device = ctx, model, model.head_device
        prompt, keep = ctx.prompt, ctx.keep
        features = ctx.features_ND if model is ctx.target else None
        if features is None:
            features = ctx.prefill.features(model, prompt, keep)
        inputs = model.pruned(prompt, features, keep, ctx.positions)
        self.cache = ctx.caches.take("draft", model, len(inputs[0]) + ctx.max_new_tokens + rows + 2)
        ctx.prefill.fill(model, inputs, self.cache, prompt, keep)
        # Key of the coupled rule's noise: the seed, and the slot of the answer's first token.
        self.noise = (ctx.seed or 0, self.cache.length)
        self.root = self.cache.length - 1  # slot of the last root; at first, slot of the prompt's last token
        self.free = self.cache.capacity - rows - 2  # a trial run of a routine writes from this slot on


class TreeSession(PrunedSession):
    """Drafts a static tree, level by level."""

    def __init__(self, ctx: DraftContext, model: VideoLM, shape: TreeShape, rule: Sampling | None) -> None:
        sample = rule is not None and not rule.coupled
        # Random numbers are drawn on the logits' device, seeded from the request's generator.
        seed = int(torch.randint(2**62, (), generator=ctx.generator)) if sample else 0
        super().__init__(ctx, model, len(shape))
        self.shape, self.rule, self.sample = shape, rule, sample
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.tokens = torch.full((len(shape),), int(ctx.prompt.tokens[-1]), device=self.device)
        races = (sum(map(len, shape.levels)), ctx.vocabulary) if sample else (0,)
        self.races = torch.ones(races, dtype=torch.float64, device=self.device)
        self.feed_both = self._round(2)
        self.feed_root = self.feed_both if ctx.captured else self._round(1)

    def _round(self, fed: int) -> Routine:
        """Return the routine that drafts one round, with `fed` rows in its first pass.

        `Routine.state` is for the runs that capture it, and makes them write to free slots only.
        """
        vocabulary = self.ctx.vocabulary
        return Routine(
            partial(expand, tables_of(self.shape, self.sample, self.device, fed), vocabulary, self.rule),
            ("tree", self.shape, vocabulary, self.rule, fed),
            self.model,
            self.cache,
            max(2, *map(len, self.shape.levels)),
            (self.free, self.free, 0, 0, 0, 0, 0),
            (torch.zeros_like(self.tokens), self.races),
        )

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Draft the tree below the bonus token, which follows the last accepted node."""
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        base = self.root + self.shape.depths[node]
        races = self.races.exponential_(generator=self.generator) if self.sample else None
        routine = self.feed_root if self.shape.children[node] else self.feed_both
        self.tokens, q_MV = yield routine((self.root, base, node, bonus, self.cache.offset, *self.noise), self.tokens, races)
        self.root = base + 1
        return DraftTree(self.tokens, self.shape.parents, q_MV if self.sample else None, ranks=self.shape.ranks)


FED_22 = torch.ones(2, 2, dtype=torch.bool).tril()  # mask of the last accepted node and the new root


class Level(NamedTuple):
    """Tables of one pass, which expands the nodes of one level.

    Attributes:
        nodes_Q: The nodes that are expanded, one per row, except that the first pass may also feed the last accepted
            node of the old tree.
        depths_Q: Positions of the rows, relative to that node's.
        at: Slot of the first row, relative to that node's.
        seen_QT: (Q, T) attention mask over slots from that node's on (see `Pass`); None for causal.
        widest: Number of best tokens taken per node.
        children_C: The nodes whose tokens the pass finds.
        guesses_C: Index of each child's token among the (nodes x widest) best tokens.
    """

    nodes_Q: Tensor
    depths_Q: Tensor
    at: int
    seen_QT: Tensor | None
    widest: int
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
        sample: True if children are drawn: child i of a node is then draw i, else the best token of the child's rank.
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
                widest,
                torch.tensor(children, device=device),
                torch.tensor([row * widest + guess for row, guess in zip(rows, guesses, strict=True)], device=device),
            )
        )
    ways, length = [DraftTree(torch.empty(0), shape.parents).way_to(node) for node in range(len(shape))], shape.depth + 1
    # An accepted node without a row is fed again, so any row will do. Rows past the path stay where they are.
    rows_MD = [[*(row_of.get(n, at) for at, n in enumerate(way)), *range(len(way), length)] for way in ways]
    moves = any(rows != list(range(length)) for rows in rows_MD)
    return Tables(torch.tensor(rows_MD, device=device), moves, tuple(levels))


def expand(
    tables: Tables,
    vocabulary: int,
    rule: Sampling | None,
    model: VideoLM,
    cache: KVCache,
    state_7: Tensor,
    old_M: Tensor,
    races_RV: Tensor,
) -> Passes[tuple[Tensor, Tensor]]:
    """Draft one round: compact the accepted rows, then expand the tree level by level.

    Args:
        tables: Tables of the tree's shape.
        vocabulary: Ids below this number are known to both models.
        rule: How children are drawn, or scored if the rule is coupled; None takes the best tokens by logits.
        model: The model that drafts.
        cache: KV cache of that model.
        state_7: Slot of the last root, slot of the last accepted node, that node, token of the new root, position minus
            slot, seed of a coupled rule, slot of the answer's first token.
        old_M: Tokens of the previous tree.
        races_RV: Exponential random numbers, one row per expanded node; (0,) if children are not drawn.

    Returns:
        Tokens (M,), and q (M, V), or (0,) if children are not drawn.
    """
    root, base, node, bonus, offset, seed, start = state_7.split(1)
    drawn = rule is not None and not rule.coupled
    if tables.moves:
        cache.move(root, tables.ways_MD.index_select(0, node)[0])
    tokens_M = torch.cat([bonus, old_M[1:]])  # the levels overwrite all old guesses
    q_MV = races_RV
    if drawn:
        wide = torch.promote_types(model.dtype, torch.float32)
        q_MV = races_RV.new_zeros((len(old_M), vocabulary), dtype=wide)
    done = 0
    for depth, level in enumerate(tables.levels, start=1):
        fed = tokens_M.index_select(0, level.nodes_Q) if level.at else torch.cat([old_M.index_select(0, node), bonus])
        rows = yield Pass(model, cache, fed, level.depths_Q, level.seen_QT, base, offset, level.at)
        logits_QV = rows.logits(level.nodes_Q.numel())[:, :vocabulary]
        if rule is None:
            best = rows.best(logits_QV, level.widest)
        elif rule.coupled:
            noise_1V = gumbel(torch.cat([seed, base + 1 - start + depth]), vocabulary)
            best = rule.scores(logits_QV, noise_1V).topk(level.widest).indices
        else:
            q_QV = rule.probabilities(logits_QV)
            q_MV.index_copy_(0, level.nodes_Q, q_QV)
            best = draw(q_QV, races_RV[done : done + len(q_QV)], level.widest)
            done += len(q_QV)
        tokens_M.index_copy_(0, level.children_C, best.take(level.guesses_C))
    return tokens_M, q_MV
