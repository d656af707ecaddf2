"""The engine for a GPU: a drafter's routine is one CUDA graph, a tree's check another, an autoregressive step a third.

The host writes a few integers before a graph and reads one small tensor behind the check. Graphs are captured once for a
shape and a cache, not for a request: the length of the context is read from the device. Prefills run as in the eager engine.

Shape suffixes: M tree nodes, Q rows of a pass, D nodes on the longest path, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from threading import RLock
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from specvlm.engine import ops
from specvlm.engine.base import Engine, Request, placed
from specvlm.engine.checking import Paths, check_of, move_of, pass_of, shape_of
from specvlm.engine.lean import ROWS, LeanText, Sight, why_not
from specvlm.engine.program import CapturePool, Program, why_not_captured
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Call, Pass, Passes, Rows, finished
from specvlm.strategies import Verifier, uniform
from specvlm.strategies.fence import checked_verdict, inside
from specvlm.types import DraftTree, Verdict

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

log = logging.getLogger(__name__)
MOST = 48  # programs of a kind captured for one cache: a drafter whose trees never repeat would capture every round


class GraphsEngine(Engine):
    """backend: of `Program`; "cudagraph" by default, the others let the same code run without a GPU."""

    name, captures = "graphs", True

    def __init__(self, backend: str = "cudagraph") -> None:
        self.backend = backend
        self.capture_s = 0.0
        self._lean: WeakKeyDictionary[VideoLM, LeanText | None] = WeakKeyDictionary()
        # A cache is not kept alive by what was captured for it; the weights that it reads are.
        self._programs: dict[tuple[Hashable, ...], tuple[ReferenceType[KVCache], Program]] = {}
        self.lanes: dict[torch.device, CapturePool] = {}
        self._lock = RLock()  # around what is kept; requests of several threads may need it at once

    # ---- the target's steps -----------------------------------------------------------------------------------------

    def next(self, request: Request, token: int) -> Passes[int]:
        if type(request.verifier).first is not Verifier.first:  # a rule of its own where nothing was guessed
            return (yield from super().next(request, token))
        root = DraftTree(torch.tensor([token], device=request.target.device), (-1,))
        verdict, _ = yield from self.check(request, root)
        return verdict.bonus

    def check(self, request: Request, tree: DraftTree) -> Passes[tuple[Verdict, list[int]]]:
        target, cache, verifier, penalty = request.target, request.cache, request.verifier, request.penalty
        lean = self.lean(target)
        # Where an answer ends under a lossy rule is read off its logits, and they stay in a captured step.
        captured = len(tree) <= ROWS and verifier.on_device and request.lossless
        if lean is None or not captured or (tree.varies and len(lean.stages) > 1):
            return (yield from super().check(request, tree))
        device, count = target.head_device, len(tree)
        base, dice = cache.length, verifier.dice(count)
        # Not every verifier, tree or model needs all of these.
        seen = penalty.seen_V if penalty.factor != 1 else torch.empty(0, dtype=torch.bool, device=device)
        numbers = uniform(dice, request.generator) if dice else None
        q = tree.q if tree.q is not None and dice else None
        state, earlier = (base, cache.offset), range(len(lean.stages) - 1)
        spent, x = self.capture_s, tree.tokens
        shape = shape_of(tree, verifier)
        for number in earlier:
            (x,) = self._through(number, lean, tree, cache)(state, x)

        def build(backend: str) -> Program:
            inputs = [
                torch.tensor([cache.capacity - count, 0], device=device),
                torch.zeros(count, dtype=torch.int64, device=device),
                torch.zeros_like(seen),
                torch.full((dice,), 0.5, dtype=torch.float64, device=device),
                torch.empty(0, device=device) if q is None else torch.zeros_like(q, device=device),
                torch.empty(0, device=device) if x is tree.tokens else torch.zeros_like(x, device=device),
                *(table.to(device) for table in shape),
            ]
            paths = Paths.of(tree, device)
            fn = partial(check_of, lean, verifier, tree.parents, tree.varies, cache, penalty.factor, paths)
            return self.capture(fn, inputs, backend, paths)

        rule = (type(verifier), repr(verifier))
        key = ("check", lean, count if shape else tree.parents, rule, penalty.factor, None if q is None else q.shape)
        again = shape or not tree.varies  # else this shape will not come back, and the rule goes by it
        with inside(verifier):  # whose rule is traced
            program = self.program(key, cache, build) if again else build("direct")
        follow = [self._follow(number, lean, tree, cache) for number in earlier if count > 1]
        if self.capture_s > spent:
            request.mark("capture")
        (outcome,) = program(state, tree.tokens, seen, numbers, q, None if x is tree.tokens else x, *shape)
        for moving in follow:
            moving((base, 0), outcome[:1])
        last, bonus, *tokens = outcome.tolist()  # the round's one read
        with inside(verifier):
            verdict = checked_verdict(verifier, verifier.verdict(last, bonus, tree), tree, target.vocabulary)
        cache.length = base + len(verdict.path)
        return verdict, [*(tokens[node] for node in verdict.path[1:]), bonus]

    def _through(self, number: int, lean: LeanText, tree: DraftTree, cache: KVCache) -> Program:
        """A check's pass through a stage that others follow."""
        device, count = lean.stages[number].device, len(tree)

        def build(backend: str) -> Program:
            state, rows = torch.tensor([cache.capacity - count, 0], device=device), torch.zeros(count, dtype=torch.int64)
            if number:
                rows = torch.zeros(count, lean.hidden, dtype=lean.dtype)
            paths = Paths.of(tree, device)
            return self.capture(partial(pass_of, lean, number, cache, paths), [state, rows.to(device)], backend, paths)

        return self.program((f"through {number}", lean, tree.parents), cache, build)

    def _follow(self, number: int, lean: LeanText, tree: DraftTree, cache: KVCache) -> Program:
        """The same stage's cache move, when the verdict is there."""
        device = lean.stages[number].device

        def build(backend: str) -> Program:
            state = torch.tensor([cache.capacity - len(tree), 0], device=device)
            last, paths = torch.zeros(1, dtype=torch.int64, device=device), Paths.of(tree, device)
            return self.capture(partial(move_of, cache.stores[number], paths), [state, last], backend, paths)

        return self.program((f"follow {number}", lean, tree.parents), cache, build)

    # ---- the drafter's ----------------------------------------------------------------------------------------------

    def call(self, call: Call, mark: Callable[[str], None]) -> Passes[Sequence[Tensor]]:
        routine, lean = call.routine, self.lean(call.routine.model)
        # A routine is one program, so a model that drafts stands on one device; a split target drafts eagerly.
        if lean is None or len(lean.stages) > 1 or routine.widest > ROWS:
            return (yield from super().call(call, mark))
        captured = self.capture_s

        def build(backend: str) -> Program:
            inputs = [torch.tensor(routine.state, device=routine.model.head_device), *routine.inputs]
            return self.capture(partial(_routine, lean, call), inputs, backend, routine.work)

        with call.guard():
            # By the function, too: no plugin can pass its own for another's by calling it the same.
            program = self.program(("draft", lean, routine.function, call.ours, *routine.key), routine.cache, build)
        if self.capture_s > captured:
            mark("capture")
        with call.guard():
            return program(call.state, *call.given)

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def lean(self, model: VideoLM) -> LeanText | None:
        """The model's lean pass; None, said once, for one that needs its own modules."""
        with self._lock:
            if model not in self._lean:
                lean = None
                if why := why_not(model) or self._misplaced(model):
                    log.warning("%s runs eager: %s", model, why)
                else:
                    lean = LeanText(model)
                    lean.ops = kernels_for(model, lean)
                self._lean[model] = lean
            return self._lean[model]

    def _misplaced(self, model: VideoLM) -> str | None:
        """A draft may lie on another device than the one the engine was made for."""
        devices = [stage.device for stage in model.stages] if self.backend == "cudagraph" else []
        return next((why for why in map(why_not_captured, devices) if why), None)

    def runs(self, model: VideoLM) -> str:
        return Engine.name if self.lean(model) is None else self.name

    def run(self, passes: Sequence[Pass]) -> list[Rows]:
        """One after another, by the lean pass. A model that needs its own modules, and a wide pass, run through these."""
        lean, found = self.lean(passes[0].model), list[Rows]()
        if lean is None:
            return super().run(passes)
        for one in passes:
            if len(one) > ROWS:
                found += super().run([one])
            else:
                one.cache.length = one.start + len(one)
                found.append(_rows(lean, one))
        return found

    def exact(self, model: VideoLM) -> bool:
        lean = self.lean(model)
        # Sums over ranks may go by another order where the fused kernel has no room for the rows.
        return lean is not None and lean.ops is not ops and model.ranks.size == 1

    def tree_rows(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Passes[Rows]:
        """By the lean pass, whatever the rule: uncaptured, and in slices of the rows that it is made for."""
        lean, device = self.lean(target), target.device
        if lean is None or (len(tree) > ROWS and lean.ops is ops):
            return (yield from super().tree_rows(target, tree, cache))
        paths = Paths.of(tree, device)
        base, offset = torch.tensor([[cache.length], [cache.offset]], device=device)
        found = []
        for at in range(0, len(tree), ROWS):
            here = slice(at, at + ROWS)
            sight = Sight(None, paths.nodes_MD[here].contiguous(), paths.depths_M[here])
            tokens = tree.tokens[here].to(device)
            found.append(lean(tokens, paths.depths_M[here], at, sight, base, offset, cache))
        cache.advance(len(tree))
        return Rows(torch.cat(found), lean.logits, lean.ops.top)

    def append(self, target: VideoLM, tokens_Q: Tensor, cache: KVCache) -> Tensor:
        parts = tokens_Q.split(ROWS if self.lean(target) else len(tokens_Q))
        return torch.cat([super(GraphsEngine, self).append(target, tokens, cache) for tokens in parts])

    def rescore(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Tensor:
        lean = self.lean(target)
        if lean is None or (len(tree) > ROWS and lean.ops is ops):
            return super().rescore(target, tree, cache)
        (depths_M, seen_MM), device = placed(tree), target.device
        base, offset = torch.tensor([[cache.length], [cache.offset]], device=device)
        depths_M, ways_MM, tokens_M = depths_M.to(device), paths_of(seen_MM).to(device), tree.tokens.to(device)
        found = []
        for at in range(0, len(tree), ROWS):
            depths, ways = depths_M[at : at + ROWS], ways_MM[at : at + ROWS]
            found.append(lean(tokens_M[at : at + ROWS], depths, at, Sight(None, ways, depths), base, offset, cache))
        cache.advance(len(tree))
        return lean.logits(torch.cat(found))

    def capture(self, fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], backend: str, tables: object) -> Program:
        """fn as a program on its inputs' device."""
        device = inputs[0].device
        if backend == "cudagraph" and device not in self.lanes:
            self.lanes[device] = CapturePool(device)
        try:
            return Program(fn, inputs, backend, self.lanes.get(device), tables)
        except BaseException:
            self.lanes.pop(device, None)  # torch may still take its memory for that of a capture, and refuse the next one
            raise

    def program(self, key: tuple[Hashable, ...], cache: KVCache, build: Callable[[str], Program]) -> Program:
        """What was captured for this cache; what was captured for those that are gone, goes. key: its first word is the kind.
        build: given a backend of Program, which runs uncaptured beyond MOST.
        """
        if self.backend == "cudagraph":  # the others hold their cache, so of those the last one alone is kept
            key = (*key, id(cache))
        with self._lock:
            held = self._programs.get(key)
            if held is not None and held[0]() is cache:
                return held[1]
            del held
            self._programs = {k: v for k, v in self._programs.items() if k != key and v[0]() is not None}
            there = {program.device for _, program in self._programs.values()}
            self.lanes = {d: lane for d, lane in self.lanes.items() if d in there}  # memory without graphs cannot be used again
            if sum(v[0]() is cache and _kind(k) == _kind(key) for k, v in self._programs.items()) >= MOST:
                return build("direct")
            start = perf_counter()
            program = build(self.backend)
            self._programs[key] = (ref(cache), program)
            self.capture_s += perf_counter() - start
            return program


def _kind(key: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Routines are of a kind where their function is the same; all else where its first word is."""
    return key[:3:2] if key[0] == "draft" else key[:1]


def kernels_for(model: VideoLM, lean: LeanText) -> ModuleType:
    """The Triton kernels where they are made for the model's dtype and device, else the plain operations."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return ops
    from specvlm.engine import kernels

    why = kernels.why_not(lean.weights(), model.head_dim)
    if why:
        log.warning("%s runs without kernels of its own: %s", model, why)
    return ops if why else kernels


def _rows(lean: LeanText, one: Pass) -> Rows:
    """A pass by the model's lean pass. Where numbers of it lie on the device, nothing is read."""
    device = lean.stages[0].device
    base, offset, depths_Q = (_there(numbers, device) for numbers in (one.base, one.offset, one.depths_Q))
    if one.seen_QT is None and not one.at:  # each row sees all before it: a path
        above_Q = torch.arange(len(one), device=device)
        sight = Sight(None, above_Q.expand(len(one), -1).contiguous(), above_Q)
    else:
        sight = Sight(one.seen(device, torch.int8))
    hidden_QD = lean(one.tokens_Q.to(device), depths_Q, one.at, sight, base, offset, one.cache)
    return Rows(hidden_QD, lean.logits, lean.ops.top)


def paths_of(seen_MM: Tensor) -> Tensor:
    """(M, M) the nodes that each node sees, in their order; what stands behind them is of no meaning."""
    return seen_MM.logical_not().to(torch.int64).argsort(stable=True)


def _there(numbers: int | Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """On the device, without a copy from the host: that would wait, which no captured step may."""
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, range):
        return torch.arange(numbers.start, numbers.stop, numbers.step, device=device)
    each = [numbers] if isinstance(numbers, int) else numbers
    return torch.cat([torch.full((1,), number, device=device) for number in each])


def _routine(lean: LeanText, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
    """A drafter's routine as one function of device tensors."""
    return finished(call.begin(*inputs), partial(_rows if call.ours else _rows_inside, lean))


def _rows_inside(lean: LeanText, one: Pass) -> Rows:
    """Of others' routines, whose slots nobody reads: a wrong one is kept inside the cache, and kernels write nowhere else."""
    most = one.cache.capacity - one.at - len(one)
    base = one.base.clamp(0, most) if isinstance(one.base, Tensor) else min(max(one.base, 0), most)
    return _rows(lean, replace(one, base=base))
