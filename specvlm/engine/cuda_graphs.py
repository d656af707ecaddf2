"""CUDA-graph engine: one graph for a drafter's routine, one for a tree's check, one for an autoregressive step.

The host writes small inputs before each graph and reads one small tensor after the check. Graphs are captured per
shape and cache, not per request: they read the context length from the device. Prefills are not captured. Steps that
several requests ask for at the same time run as one where possible (see `batch.py` and `drafts.py`).

Shape suffixes: M tree nodes, Q rows of a pass, D hidden size, P nodes of a path (padded), V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import RLock
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, proxy, ref

import torch
from torch import Tensor

from specvlm.engine import ops, single
from specvlm.engine.base import Engine, Inputs, Request, Submitted, placed
from specvlm.engine.batch import Batch, why_not_joined
from specvlm.engine.checking import Paths
from specvlm.engine.contexts import paths_of
from specvlm.engine.drafts import draft, routine_of
from specvlm.engine.exact_prefill import exact_prefilling
from specvlm.engine.lean import ROWS, LeanText, run_pass, run_tree, why_not
from specvlm.engine.program import CapturePool, Program, why_not_captured
from specvlm.engine.steps import Check, Drafting
from specvlm.models.host_copy import HostCopy
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Call, Jobs, Pass, Rows
from specvlm.models.pauses import Pauses
from specvlm.strategies import Verifier, uniform
from specvlm.types import DraftTree, Verdict, VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.attention import AttentionCollector
    from specvlm.models.video_lm import VideoLM

Item: TypeAlias = "Pass | Check | Drafting"  # what requests ask this engine to run

log = logging.getLogger(__name__)
MOST = 48  # maximum number of programs of one kind per owner: trees that never repeat must not be captured every round


class GraphsEngine(Engine):
    """Engine that captures drafting and verification as CUDA graphs.

    Args:
        backend: How a `Program` runs. The default needs a GPU; the others run the same code without one, for tests.
    """

    name, captures = "graphs", True

    def __init__(self, backend: str = "cudagraph") -> None:
        self.backend = backend
        self.capture_s = 0.0
        self._lean: WeakKeyDictionary[VideoLM, LeanText | None] = WeakKeyDictionary()
        self._batches: WeakKeyDictionary[VideoLM, Batch | None] = WeakKeyDictionary()
        # Weak references: a captured program does not keep its owner alive. Its key keeps the weights.
        self._programs: dict[tuple[Hashable, ...], tuple[ReferenceType[Any], Program]] = {}
        self.capture_pools: dict[torch.device, CapturePool] = {}
        self._lock = RLock()  # guards the dicts above; requests may run in several threads

    # ---- target steps -----------------------------------------------------------------------------------------------

    def prefilling(
        self,
        target: VideoLM,
        prompt: VideoPrompt,
        inputs: Inputs,
        cache: KVCache,
        collector: AttentionCollector | None = None,
        refill: Callable[[], None] | None = None,
    ) -> Pauses[Tensor]:
        """Prefill as `exact_prefilling` does if the model is exact, else as the eager engine does.

        A prompt without a video is always prefilled as by the eager engine, since no beginning of it could be reused.
        So is a prompt that ends with a video or an image.
        """
        lean = self.lean(target)
        if not prompt.cut or prompt.text == len(prompt) or lean is None or not self.exact(target):
            return (yield from super().prefilling(target, prompt, inputs, cache, collector))
        return (yield from exact_prefilling(lean, target, prompt, inputs, cache, collector, refill))

    def next(self, request: Request, token: int) -> Jobs[int]:
        if type(request.verifier).first is not Verifier.first:  # the verifier has its own rule here
            return (yield from super().next(request, token))
        root = DraftTree(torch.tensor([token]), (-1,))
        verdict, _ = yield from self.check(request, root)
        return verdict.bonus

    def check(self, request: Request, tree: DraftTree) -> Jobs[tuple[Verdict, list[int]]]:
        return (yield from self.answer(self._check_of(request, tree)))

    def submit(self, request: Request, tree: DraftTree) -> Jobs[Submitted]:
        """Start a check. If it runs in one pass with checks of other requests, also waits for the answer."""
        check = self._check_of(request, tree)
        if isinstance(check, Check):
            check.waits = False
            yield check
            check.waits = True
        return check

    def answer(self, submitted: Submitted) -> Jobs[tuple[Verdict, list[int]]]:
        if isinstance(submitted, Check):
            return (yield submitted) if submitted.answer is None else submitted.answer
        return (yield from super().check(submitted.request, submitted.tree))

    def _check_of(self, request: Request, tree: DraftTree) -> Submitted:
        """Make a tree's check: a `Check` if it can be captured."""
        verifier, lean = request.verifier, self.lean(request.target)
        # `strict_ends` needs a lossy rule's logits, which a captured step does not return.
        captured = len(tree) <= ROWS and verifier.on_device and request.lossless and request.penalty.captures
        if lean is None or not captured or (tree.varies and len(lean.stages) > 1):
            return Submitted(request, tree)
        dice = verifier.dice(len(tree))
        return Check(request, tree, uniform(dice, request.generator) if dice else None)

    # ---- draft routines ---------------------------------------------------------------------------------------------

    def call(self, call: Call, mark: Callable[[str], None]) -> Jobs[Sequence[Tensor]]:
        routine, lean = call.routine, self.lean(call.routine.model)
        # A routine is one program, which runs on one device; a pipelined target that drafts runs eagerly.
        if lean is None or len(lean.stages) > 1 or routine.widest > ROWS:
            return (yield from super().call(call, mark))
        return (yield Drafting(call, mark))

    def _draft(self, lean: LeanText, call: Call, mark: Callable[[str], None]) -> Sequence[Tensor]:
        """Run one routine."""
        routine, captured = call.routine, self.capture_s

        def build(backend: str) -> Program:
            inputs = [torch.tensor(routine.state, device=routine.model.head_device), *routine.inputs]
            return self.capture(partial(routine_of, lean, call), inputs, backend, routine.work)

        with call.guard():
            # Key by the function too: two plugins may use equal keys.
            program = self.program(("draft", lean, routine.function, call.ours, *routine.key), routine.cache, build)
        if self.capture_s > captured:
            mark("capture")
        with call.guard():
            return program(call.state, *call.given)

    # ---- cached state -----------------------------------------------------------------------------------------------

    def lean(self, model: VideoLM) -> LeanText | None:
        """Return the model's lean pass, cached. None, with one warning, if the model or its device rules that out."""
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

    def _batch(self, model: VideoLM, lean: LeanText) -> Batch | None:
        """Return the `Batch` of a model, cached. None if its requests' steps run one by one."""
        with self._lock:
            if model not in self._batches:
                self._batches[model] = None if why_not_joined(lean) else Batch(lean, proxy(self))
            return self._batches[model]

    def _misplaced(self, model: VideoLM) -> str | None:
        """Say why one of the model's devices, which may not be the engine's, cannot capture. None if all can."""
        devices = [stage.device for stage in model.stages] if self.backend == "cudagraph" else []
        return next((why for why in map(why_not_captured, devices) if why), None)

    def runs(self, model: VideoLM) -> str:
        return Engine.name if self.lean(model) is None else self.name

    def run(self, passes: Sequence[Item]) -> list[Any]:
        """Run steps of one model: checks of several requests together, drafts together, and other passes one by one."""
        lean = self.lean(passes[0].model)
        if lean is None:
            return super().run(passes)
        spent = self.capture_s
        if len(passes) > 1 and (batch := self._batch(passes[0].model, lean)) is not None:
            checks = [one for one in passes if isinstance(one, Check) and not (one.answer or one.decided)]
            drafts = [one for one in passes if isinstance(one, Drafting) and one.answer is None and one.call.joins]
            if len(drafts) > 1:
                draft(batch, drafts)
            if len(checks) > 1:
                batch.check(checks)
            if self.capture_s > spent:
                for mark in (*(one.request.mark for one in checks), *(one.mark for one in drafts)):
                    mark("capture")
        return [self._run_one(lean, one) for one in passes]

    def _run_one(self, lean: LeanText, one: Item) -> Any:
        """Run one step, unless it has its answer. A pass of more than ROWS rows runs through Hugging Face's modules."""
        if isinstance(one, Check):
            return self._run_check(lean, one)
        if isinstance(one, Drafting):
            one.answer = self._draft(lean, one.call, one.mark) if one.answer is None else one.answer
            return one.answer
        if len(one) > ROWS:
            return super().run([one])[0]
        one.cache.length = one.start + len(one)
        return run_pass(lean, one)

    def _run_check(self, lean: LeanText, check: Check) -> tuple[Verdict, list[int]] | None:
        """Start a check that has not started, and return its answer if it waits for one."""
        if check.decided is not None and check.waits:
            check.answer = check.answer or single.decide(check, check.decided.read())
        elif check.answer is None and check.decided is None:
            outcome = single.start(self, lean, check)
            if check.waits:
                check.answer = single.decide(check, outcome.tolist())  # the only host read of a check
            else:
                check.decided = HostCopy(outcome)
        return check.answer

    def exact(self, model: VideoLM) -> bool:
        lean = self.lean(model)
        # Sums over ranks may have another order if the fused kernel has no room for the rows.
        return lean is not None and lean.ops is not ops and model.ranks.size == 1

    def tree_rows(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Jobs[Rows]:
        """Run a tree uncaptured through the lean pass, if the model has one, at most ROWS rows at a time.

        Without kernels, a tree of more rows runs through Hugging Face's modules.
        """
        lean, device = self.lean(target), target.device
        if lean is None or (len(tree) > ROWS and lean.ops is ops):
            return (yield from super().tree_rows(target, tree, cache))
        paths = Paths.of(tree, device)
        hidden_MD = run_tree(lean, tree.tokens.to(device), paths.depths_M, paths.nodes_MD, cache)
        return Rows(hidden_MD, lean.logits, lean.ops.top)

    def append(self, target: VideoLM, tokens_Q: Tensor, cache: KVCache) -> Tensor:
        parts = tokens_Q.split(ROWS if self.lean(target) else len(tokens_Q))
        return torch.cat([super(GraphsEngine, self).append(target, tokens, cache) for tokens in parts])

    def rescore(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Tensor:
        lean = self.lean(target)
        if lean is None or (len(tree) > ROWS and lean.ops is ops):
            return super().rescore(target, tree, cache)
        (depths_M, seen_MM), device = placed(tree), target.device
        tables = depths_M.to(device), paths_of(seen_MM).to(device)
        return lean.logits(run_tree(lean, tree.tokens.to(device), *tables, cache))

    def capture(
        self, fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], backend: str, tables: object = None
    ) -> Program:
        """Make a program of fn on the device of its inputs."""
        device = inputs[0].device
        if backend == "cudagraph" and device not in self.capture_pools:
            self.capture_pools[device] = CapturePool(device)
        try:
            return Program(fn, inputs, backend, self.capture_pools.get(device), tables)
        except BaseException:
            self.capture_pools.pop(device, None)  # torch may still count it as capturing and refuse the next capture
            raise

    def program(self, key: tuple[Hashable, ...], owner: KVCache | LeanText, build: Callable[[str], Program]) -> Program:
        """Return the program of a key and owner, built at first use. Drops the programs of owners that are gone.

        Args:
            key: What the program depends on, besides the owner. The first item is the kind: "check", "draft", …
            owner: KV cache that the program works on. For a joined pass, which works on any cache, the lean pass.
            build: Makes the program for a backend. Once an owner has MOST programs of a kind, the backend is "direct",
                and the program is not kept.
        """
        if self.backend == "cudagraph":  # other backends keep their cache alive, so keep one program per key
            key = (*key, id(owner))
        with self._lock:
            held = self._programs.get(key)
            if held is not None and held[0]() is owner:
                return held[1]
            del held
            self._programs = {k: v for k, v in self._programs.items() if k != key and v[0]() is not None}
            there = {program.device for _, program in self._programs.values()}
            # A pool without graphs cannot be used again.
            self.capture_pools = {d: pool for d, pool in self.capture_pools.items() if d in there}
            if sum(v[0]() is owner and _kind(k) == _kind(key) for k, v in self._programs.items()) >= MOST:
                return build("direct")
            start = perf_counter()
            program = build(self.backend)
            self._programs[key] = (ref(owner), program)
            self.capture_s += perf_counter() - start
            return program


def _kind(key: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Return the kind of a program, by which MOST limits them: the key's first item, and a routine's function."""
    return key[:3:2] if key[0] == "draft" else key[:1]


def kernels_for(model: VideoLM, lean: LeanText) -> ModuleType:
    """Return the Triton kernels if they support the model's dtype, device and shapes, else the plain operations."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return ops
    from specvlm.engine import kernels

    why = kernels.why_not(lean.weights(), model.head_dim)
    if why:
        log.warning("%s runs without Triton kernels: %s", model, why)
    return ops if why else kernels
