"""Draft a static tree with a model that sees the pruned video (SpecVLM, section 3; the default tree is EAGLE-1's).

Shape suffixes: M tree nodes, R nodes that are expanded, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specvlm.errors import UserError, message
from specvlm.models.passes import Pass, Routine, Work
from specvlm.strategies import DraftContext, Drafter, Sampling
from specvlm.strategies.drafters.expanding import expand, tables_of
from specvlm.strategies.drafters.pruned import PrunedSession, drafting_model
from specvlm.strategies.drafters.shapes import AUTO, ROOT, STEADY, shapes_for
from specvlm.types import DraftTree, TreeShape, Verdict
from specvlm.types.costs import RoundCost, read_costs

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

AT_ONCE = 64  # rows of a pass that reads tokens without guessing


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
        shape: `paper` (25 guesses), `chain:5`, `4x2x1`, a literal `[[0],[1],[0,0]]`, a .json file with such a list, or
            `auto`: chosen for each round by measured costs, acceptance and the number of requests that run
            (docs/guides/trees.md).
        children: `top` takes each node's best tokens; `sample` draws them without replacement from the draft's
            distribution, warped like the verifier's; `auto` goes by the verifier: it samples for `sampling`, takes the
            best tokens by score with the shared noise for `coupled`, and the best tokens for others. The output is
            exact under every lossless verifier.
        costs: With `shape=auto`, the costs.json of `python -m specvlm.advise` to start from; without one, costs are
            measured while decoding.

    Raises:
        ValueError: The shape is malformed, `children` is unknown, or `costs` is not a costs.json or not for `auto`.
    """

    name = "tree"
    paper = "SpecVLM (arXiv 2508.16201)"
    fidelity = "exact"
    model = "draft"
    prefills = True
    shape: str = "paper"
    children: str = "auto"
    costs: str = ""

    def __post_init__(self) -> None:
        if self.shape != AUTO:
            TreeShape.parse(self.shape)
        if self.children not in ("auto", "top", "sample"):
            raise ValueError(f"children={self.children!r} is none of auto, top, sample")
        if self.costs and self.shape != AUTO:
            raise ValueError("costs is for shape=auto")
        self.known()

    def known(self) -> tuple[RoundCost, ...]:
        """Return the costs in the file `costs`; empty if none is set. Raises ValueError if it is not a costs.json."""
        try:
            return read_costs(Path(self.costs), self.name) if self.costs else ()
        except OSError as error:
            raise ValueError(f"costs={self.costs}: {message(error)}") from None

    @property
    def shapes(self) -> tuple[TreeShape, ...]:
        """Every shape that a tree may have."""
        return shapes_for(captured=False) if self.shape == AUTO else (TreeShape.parse(self.shape),)

    @property
    def max_nodes(self) -> int:
        return max(map(len, self.shapes))

    @property
    def fixed(self) -> TreeShape | None:
        return None if self.shape == AUTO else TreeShape.parse(self.shape)

    @property
    def adapts(self) -> bool:
        return self.shape == AUTO

    def start(self, ctx: DraftContext) -> TreeSession:
        kind = TreeSession if self.fixed else VaryingTreeSession
        return kind(ctx, drafting_model(ctx, self.model), max(self.shapes, key=len), self.rule_of(ctx))

    def rule_of(self, ctx: DraftContext) -> Sampling | None:
        """Return how children are drawn or scored; None takes the best tokens.

        Raises UserError if `children` and the verifier conflict, or the shape has more children than there are tokens.
        """
        widest = max(rank for shape in self.shapes for rank in shape.ranks) + 1
        if widest > ctx.vocabulary:
            raise UserError(f"drafter.shape={self.shape} needs {widest} guesses per node, there are {ctx.vocabulary} tokens")
        rule = None if self.children == "top" or not ctx.sampling.temperature else ctx.sampling
        if self.children == "sample" and ctx.sampling.temperature == 0:
            raise UserError("drafter.children=sample needs a verifier that samples: use verifier=sampling, or children=auto")
        if rule is not None and self.children == "sample":
            rule = replace(rule, coupled=False)
        return rule


class TreeSession(PrunedSession):
    """Drafts static trees, level by level. Their shape is fixed, except in `VaryingTreeSession`.

    Args:
        ctx: Context of the request.
        model: The model that drafts.
        shape: The shape, or the largest that may be chosen.
        rule: How children are drawn, or scored if the rule is coupled; None takes the best tokens by logits.
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
        self.routines: dict[tuple[TreeShape, int, int], Routine] = {}
        self.buffers: dict[TreeShape, Tensor] = {}

    @property
    def races(self) -> Tensor:
        """Random numbers of the shape's expanded nodes, one row each; (0,) if children are not drawn."""
        if self.shape not in self.buffers:
            size = (sum(map(len, self.shape.levels)), self.ctx.vocabulary) if self.sample else (0,)
            self.buffers[self.shape] = torch.ones(size, dtype=torch.float64, device=self.device)
        return self.buffers[self.shape]

    def routine(self, fed: int, first: int = 0, *known: Tensor) -> Routine:
        """Return the routine that drafts a round of the current shape.

        `Routine.state` is for the runs that capture it, and makes them write to free slots only.

        Args:
            fed: Number of rows of the first pass.
            first: First level to expand; see `expand`.
            known: Further example inputs of the routine.
        """
        shape, vocabulary = self.shape, self.ctx.vocabulary
        if (shape, fed, first) not in self.routines:
            tables = tables_of(shape, self.sample, self.device, fed)
            self.routines[shape, fed, first] = Routine(
                partial(expand, tables, vocabulary, self.rule, first, self.more),
                ("tree", shape, vocabulary, self.rule, fed, first, self.more),
                self.model,
                self.cache,
                max(2, *map(len, shape.levels)),
                (self.free, self.free, 0, 0, 0, 0, 0),
                (torch.zeros(len(shape), dtype=torch.int64, device=self.device), self.races, *known),
            )
        return self.routines[shape, fed, first]

    def anew(self, there: bool) -> Routine:
        """Return the routine that drafts a whole tree. there: Whether the last accepted node's row is in the cache."""
        return self.routine(1 if there and not self.ctx.captured else 2)

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Draft the tree below the bonus token, which follows the last accepted node."""
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        return (yield from self.draft(node, bonus, bool(self.shape.children[node])))

    def draft(self, node: int, bonus: int, there: bool) -> Work[DraftTree]:
        """Draft a tree below `bonus`, which follows `node` of the last tree. there: As for `anew`."""
        base = self.root + self.shape.depths[node]
        routine = self.anew(there)
        races = self.races.exponential_(generator=self.generator) if self.sample else None
        self.tokens, q_MV = yield routine((self.root, base, node, bonus, self.cache.offset, *self.noise), self.tokens, races)
        self.root = base + 1
        return DraftTree(self.tokens, self.shape.parents, q_MV if self.sample else None, ranks=self.shape.ranks)


class VaryingTreeSession(TreeSession):
    """Drafts a tree of the shape that `ctx.next_shape` chooses, which may have no guesses.

    Rounds without guesses run no pass of the draft. The next round with guesses first feeds it what it missed.
    """

    def __init__(self, ctx: DraftContext, model: VideoLM, shape: TreeShape, rule: Sampling | None) -> None:
        super().__init__(ctx, model, shape, rule)
        self.next_shape = ctx.next_shape or partial(TreeShape.parse, STEADY)
        self.unread: list[Tensor] = []  # (1,) tokens before the new root whose rows are missing

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        shape, there = self.next_shape(), bool(self.shape.children[node])
        if not there:
            self.unread.append(self.tokens[node : node + 1])
        if shape != self.shape:
            node = self._leave(node, shape)
        if shape == ROOT:
            self.root, self.tokens = self.root + 1, torch.tensor([bonus], device=self.device)
            return DraftTree(self.tokens, ROOT.parents, ranks=ROOT.ranks)
        yield from self._read()
        return (yield from self.draft(node, bonus, there))

    def _leave(self, node: int, shape: TreeShape) -> int:
        """Continue from a node of the last tree as if it were the root of one of the new shape. Returns that root."""
        tables = tables_of(self.shape, self.sample, self.device, 2)
        if tables.moves:
            self.cache.move(torch.tensor([self.root], device=self.device), tables.ways_MD[node])
        self.root += self.shape.depths[node]
        self.shape, self.tokens = shape, self.tokens[node : node + 1].repeat(len(shape))
        return 0

    def _read(self) -> Work[None]:
        """Read the tokens that the draft has not seen, except the last, which the first pass of the tree feeds."""
        many = torch.cat(self.unread[:-1]) if len(self.unread) > 1 else torch.empty(0, dtype=torch.int64)
        self.unread, at = [], self.root - len(many)
        for part in many.split(AT_ONCE) if len(many) else ():
            yield Pass(self.model, self.cache, part, range(len(part)), None, at, self.cache.offset)
            at += len(part)
