"""The engine for a GPU: a tree's whole expansion is one CUDA graph, its check another, an autoregressive step a third.

The host writes a few integers before a graph and reads one small tensor behind the check. Graphs are captured once for a
shape and a cache, not for a request: the length of the context is read from the device. Prefills run as in the eager engine.

Shape suffixes: M tree nodes, Q rows of a pass, D nodes on the longest path, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from specvlm.cache import KVCache
from specvlm.drafters.tree import Plan, TreeSession, draw
from specvlm.engine import Engine, Request, ops
from specvlm.engine.lean import ROWS, LeanText, why_not
from specvlm.engine.program import Program
from specvlm.penalty import RepetitionPenalty
from specvlm.strategy import DraftContext, DraftSession, Sampling, Verifier, VerifyContext, uniform
from specvlm.types import DraftTree, TreeShape, Verdict

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

log = logging.getLogger(__name__)
_NOBODY = torch.Generator()  # in a captured step random numbers are inputs
MOST = 48  # programs captured for one cache: a drafter whose trees never repeat would capture every round


class GraphsEngine(Engine):
    """backend: of `Program`; "cudagraph" by default, the others let the same code run without a GPU."""

    name = "graphs"

    def __init__(self, backend: str = "cudagraph") -> None:
        self.backend = backend
        self.capture_s = 0.0
        self._lean: WeakKeyDictionary[VideoLM, LeanText | None] = WeakKeyDictionary()
        # A cache is not kept alive by what was captured for it; the weights that it reads are.
        self._programs: dict[tuple[Hashable, ...], tuple[ReferenceType[KVCache], Program]] = {}
        self.pool = torch.cuda.graph_pool_handle() if backend == "cudagraph" else None

    # ---- the target's steps -----------------------------------------------------------------------------------------

    def next(self, request: Request, token: int) -> int:
        if type(request.verifier).first is not Verifier.first:  # a rule of its own where nothing was guessed
            return super().next(request, token)
        root = DraftTree(torch.tensor([token], device=request.target.device), (-1,))
        return self.check(request, root)[0].bonus

    def check(self, request: Request, tree: DraftTree) -> tuple[Verdict, list[int]]:
        target, cache, verifier, penalty = request.target, request.cache, request.verifier, request.penalty
        lean = self.lean(target)
        if lean is None or len(tree) > ROWS or not verifier.on_device:
            return super().check(request, tree)
        device, count = target.device, len(tree)
        base, dice = cache.length, verifier.dice(count)
        # Not every verifier, tree or model needs all of these.
        seen = penalty.seen_V if penalty.factor != 1 else torch.empty(0, dtype=torch.bool, device=device)
        numbers = uniform(dice, request.generator) if dice else None
        q = tree.q if tree.q is not None and dice else None

        def build(backend: str) -> Program:
            inputs = [
                torch.tensor([cache.capacity - count, 0], device=device),
                torch.zeros(count, dtype=torch.int64, device=device),
                torch.zeros_like(seen),
                torch.full((dice,), 0.5, dtype=torch.float64, device=device),
                torch.empty(0, device=device) if q is None else torch.zeros_like(q),
            ]
            paths = _Paths(tree.parents, device)
            fn = partial(_check, lean, verifier, tree.parents, cache, penalty.factor, paths)
            return Program(fn, inputs, backend, self.pool, paths)

        rule = (type(verifier), repr(verifier))
        key = ("check", lean, tree.parents, rule, penalty.factor, None if q is None else q.shape)
        captured = self.capture_s
        program = self.program(key, cache, build)
        if self.capture_s > captured:
            request.mark("capture")
        (outcome,) = program((base, cache.offset), tree.tokens, seen, numbers, q)
        last, bonus, *tokens = outcome.tolist()  # the round's one read
        verdict = verifier.verdict(last, bonus, tree)
        cache.length = base + len(verdict.path)
        return verdict, [*(tokens[node] for node in verdict.path[1:]), bonus]

    # ---- the drafter's ----------------------------------------------------------------------------------------------

    def tree_session(self, ctx: DraftContext, model: VideoLM, shape: TreeShape, sample: bool) -> DraftSession:
        lean = self.lean(model)
        if lean is None or max(map(len, shape.levels)) > ROWS:
            return super().tree_session(ctx, model, shape, sample)
        return CapturedTree(ctx, model, shape, sample, lean, self)

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def lean(self, model: VideoLM) -> LeanText | None:
        """The model's lean pass; None, said once, for one that needs its own modules."""
        if model not in self._lean:
            lean = None
            if why := why_not(model):
                log.warning("%s runs eager: %s", model, why)
            else:
                lean = LeanText(model)
                lean.ops = kernels_for(model, lean)
            self._lean[model] = lean
        return self._lean[model]

    def runs(self, model: VideoLM) -> str:
        return Engine.name if self.lean(model) is None else self.name

    def append(self, target: VideoLM, tokens_Q: Tensor, cache: KVCache) -> Tensor:
        lean = self.lean(target)
        if lean is None:
            return super().append(target, tokens_Q, cache)
        parts = []
        for tokens in tokens_Q.to(target.device).split(ROWS):
            rows = torch.arange(len(tokens), device=target.device)
            seen = torch.ones(len(tokens), len(tokens), dtype=torch.int8, device=target.device).tril()
            base, offset = torch.tensor([[cache.length], [cache.offset]], device=target.device)
            parts.append(lean.logits(lean(tokens, rows, 0, seen, base, offset, cache)))
            cache.advance(len(tokens))
        return torch.cat(parts)

    def program(self, key: tuple[Hashable, ...], cache: KVCache, build: Callable[[str], Program]) -> Program:
        """What was captured for this cache; what was captured for those that are gone, goes. build: given a backend of Program,
        which runs uncaptured beyond MOST.
        """
        if self.backend == "cudagraph":  # the others hold their cache, so of those the last one alone is kept
            key = (*key, id(cache))
        held = self._programs.get(key)
        if held is None or held[0]() is not cache:
            del held
            self._programs = {k: v for k, v in self._programs.items() if k != key and v[0]() is not None}
            if not self._programs and self.backend == "cudagraph":
                self.pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone cannot be used again
            if sum(v[0]() is cache for v in self._programs.values()) >= MOST:
                return build("direct")
            start = perf_counter()
            held = self._programs[key] = (ref(cache), build(self.backend))
            self.capture_s += perf_counter() - start
        return held[1]


def kernels_for(model: VideoLM, lean: LeanText) -> ModuleType:
    """The Triton kernels where they are made for the model's dtype and device, else the plain operations."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return ops
    from specvlm.engine import kernels

    why = kernels.why_not(lean.weights(), model.head_dim)
    if why:
        log.warning("%s runs without kernels of its own: %s", model, why)
    return ops if why else kernels


def _ways(tree: DraftTree, row_of: Callable[[int, int], int]) -> list[list[int]]:
    """For each node the rows (row_of a node and its depth) on its way from the root. Behind its end a way goes straight on, so
    that rows moved along it stay where they are.
    """
    length = max(tree.depths) + 1
    ways = [tree.way_to(node) for node in range(len(tree))]
    return [[*(row_of(n, depth) for depth, n in enumerate(way)), *range(len(way), length)] for way in ways]


class _Paths:
    """A tree's ways from the root, as tables on the device."""

    def __init__(self, parents: tuple[int, ...], device: torch.device) -> None:
        tree = DraftTree(torch.empty(0), parents)
        self.nodes_MD = torch.tensor(_ways(tree, lambda node, _: node), device=device)
        self.depths_M = torch.tensor(tree.depths, device=device)
        self.seen_MM = tree.mask.to(device, torch.int8)


def _check(
    lean: LeanText,
    verifier: Verifier,
    parents: tuple[int, ...],
    cache: KVCache,
    factor: float,
    paths: _Paths,
    state_2: Tensor,
    tokens_M: Tensor,
    seen_V: Tensor,
    dice: Tensor,
    q_MV: Tensor,
) -> tuple[Tensor]:
    """Pass, penalty, verdict and cache move. state: slot of the root, position - slot."""
    base, offset = state_2[:1], state_2[1:]
    tree = DraftTree(tokens_M, parents, q_MV if len(q_MV) else None)
    logits_MV = lean.logits(lean(tokens_M, paths.depths_M, 0, paths.seen_MM, base, offset, cache))
    if factor != 1:
        logits_MV = RepetitionPenalty(factor, seen_V)(logits_MV, tree)
    decision_2 = verifier.decide(VerifyContext(tree, logits_MV, _NOBODY, dice))
    if len(parents) > 1:
        cache.move(base, paths.nodes_MD.index_select(0, decision_2[:1])[0])
    return (torch.cat([decision_2, tokens_M]),)


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
        self.program = engine.program(key, self.cache, self._build)
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
        return Program(fn, inputs, backend, self.engine.pool, rows)

    def propose(self, last: Verdict | None) -> DraftTree:
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        if self.races is not None:
            self.races.exponential_(generator=self.generator)
        self.tokens, q_MV = self.program((self.root, node, bonus, self.cache.offset), self.tokens, None)
        self.root += self.plan.shape.depths[node] + 1
        return DraftTree(self.tokens, self.plan.shape.parents, q_MV if self.sample else None)


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
        ways = _ways(DraftTree(torch.empty(0), shape.parents), plan.row_of.get)
        self.rows_MD = torch.tensor(ways, device=device)
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
    cache.move(root, rows.rows_MD.index_select(0, node)[0])
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
