"""Draft a static tree with a model that sees the pruned video (SpecVLM, section 3; the default tree is EAGLE-1's).

Shape suffixes: M tree nodes, R nodes that are expanded, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.passes import Routine, Work
from specvlm.strategies import DraftContext, Drafter, DraftSession, Sampling
from specvlm.strategies.drafters.expanding import expand, tables_of
from specvlm.types import DraftTree, TreeShape, Verdict

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
        return TreeSession(ctx, drafting_model(ctx, self.model), self.fixed, self.rule_of(ctx))

    def rule_of(self, ctx: DraftContext) -> Sampling | None:
        """Return how children are drawn or scored; None takes the best tokens. Raises UserError if the keys conflict."""
        widest = max(self.fixed.ranks) + 1
        if widest > ctx.vocabulary:
            raise UserError(f"drafter.shape={self.shape} asks {widest} guesses of a node, there are {ctx.vocabulary} tokens")
        rule = None if self.children == "top" or not ctx.sampling.temperature else ctx.sampling
        if self.children == "sample" and ctx.sampling.temperature == 0:
            raise UserError("drafter.children=sample needs a verifier that samples: use verifier=sampling, or children=auto")
        if rule is not None and self.children == "sample":
            rule = replace(rule, coupled=False)
        return rule


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
        features = ctx.features_ND if ctx.features_ND is not None and model is ctx.target else model.features(prompt, keep)
        embeds, positions = model.pruned(prompt, features, keep, ctx.positions)
        self.cache = ctx.caches.take("draft", model, len(embeds) + ctx.max_new_tokens + rows + 2)
        model.prefill(embeds, positions, self.cache)
        # Key of the coupled rule's noise: the seed, and the slot of the answer's first token.
        self.noise = (ctx.seed or 0, self.cache.length)
        self.root = self.cache.length - 1  # slot of the last root; at first, slot of the prompt's last token
        self.free = self.cache.capacity - rows - 2  # a trial run of a routine writes from this slot on


class TreeSession(PrunedSession):
    """Drafts a static tree, level by level.

    Args:
        ctx: Context of the request.
        model: The model that drafts.
        shape: Shape of the tree.
        rule: How children are drawn or scored; None takes the best tokens.
        rows: Maximum number of rows that a round writes; by default those of the tree.
        more: Number of corrections to find per expanded node.
    """

    def __init__(
        self, ctx: DraftContext, model: VideoLM, shape: TreeShape, rule: Sampling | None, rows: int = 0, more: int = 0
    ) -> None:
        sample = rule is not None and not rule.coupled
        # Random numbers are drawn on the logits' device, seeded from the request's generator.
        seed = int(torch.randint(2**62, (), generator=ctx.generator)) if sample else 0
        super().__init__(ctx, model, rows or len(shape))
        self.shape, self.rule, self.sample, self.more = shape, rule, sample, more
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.tokens = torch.full((len(shape),), int(ctx.prompt.tokens[-1]), device=self.device)
        races = (sum(map(len, shape.levels)), ctx.vocabulary) if sample else (0,)
        self.races = torch.ones(races, dtype=torch.float64, device=self.device)
        self.feed_both = self.round_of(2)
        self.feed_root = self.feed_both if ctx.captured else self.round_of(1)

    def round_of(self, fed: int, first: int = 0, *known: Tensor) -> Routine:
        """Return the routine that drafts one round.

        `Routine.state` is for the runs that capture it, and makes them write to free slots only.

        Args:
            fed: Number of rows of the first pass.
            first: First level to expand; see `expand`.
            known: Examples of more inputs.
        """
        tables, vocabulary = tables_of(self.shape, self.sample, self.device, fed), self.ctx.vocabulary
        return Routine(
            partial(expand, tables, vocabulary, self.rule, first, self.more),
            ("tree", self.shape, vocabulary, self.rule, fed, first, self.more),
            self.model,
            self.cache,
            max(2, *map(len, self.shape.levels)),
            (self.free, self.free, 0, 0, 0, 0, 0),
            (torch.zeros_like(self.tokens), self.races, *known),
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
