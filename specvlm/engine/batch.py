"""Steps of several requests on a GPU in one captured pass (continuous batching).

A pass is captured by the number of its rows and of its requests, rounded up, and serves any requests: addresses of
their caches are inputs. The rows of a request have the bits that they have in a pass alone (see
`kernels/path_decoding.py`), so a request's answer does not depend on who else is there.

Shape suffixes: B requests, Q rows of the pass, P slots of the longest path, M tree nodes, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from specvlm.engine import ops
from specvlm.engine.base import tree_pass
from specvlm.engine.contexts import (
    SLOTS,
    Contexts,
    Layout,
    Shape,
    addresses,
    blocks_for,
    capturing,
    frame_of,
    layout_of,
    rounded,
)
from specvlm.engine.lean import LeanText, Places
from specvlm.engine.program import Program
from specvlm.engine.steps import Check, Scored, clamped, grouped, side_by_side
from specvlm.errors import line
from specvlm.models.passes import Call, Pass, Rows
from specvlm.strategies import VerifyContext
from specvlm.strategies.fence import checked_verdict, inside, is_ours
from specvlm.types import Verdict

if TYPE_CHECKING:
    pass

T = TypeVar("T")
log = logging.getLogger(__name__)
LAYOUTS = 64  # maximum number of layouts kept; shapes recur every round
_OF_PASSES = ("tokens_Q", "base", "offset")
_NOBODY = torch.Generator()  # unused: random numbers are drawn ahead


def why_not_joined(lean: LeanText) -> str | None:
    """Say why passes of several requests cannot run as one; None if they can."""
    if lean.ops is ops:
        return "it runs without Triton kernels"
    return "it runs on several devices" if len(lean.stages) > 1 or lean.ranks.size > 1 else None


class Keeper(Protocol):
    """What a batch needs of its engine, which makes programs and keeps them."""

    def program(self, key: tuple[Hashable, ...], owner: LeanText, build: Callable[[str], Program]) -> Program: ...

    def capture(
        self, fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], backend: str, tables: object = None
    ) -> Program: ...


class Batch:
    """Runs steps of several requests of one model.

    Args:
        lean: The model's lean pass, which `why_not_joined` admits.
        engine: Keeps the programs; a weak reference will do.
    """

    def __init__(self, lean: LeanText, engine: Keeper) -> None:
        self.lean, self._engine = lean, engine
        self.anchor, self.device = lean.text.embed_tokens.weight, lean.stages[0].device
        self.kv_heads = lean.layers[0].qkv[1].outputs // lean.width
        self.group = lean.heads // self.kv_heads
        self._layouts: OrderedDict[Hashable, tuple[Layout, object]] = OrderedDict()
        self._frames: dict[tuple[Shape, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._failed = set[Hashable]()
        self._last: dict[Shape, tuple[Program, Layout]] = {}  # the layout in a program's buffers

    def check(self, checks: Sequence[Check]) -> None:
        """Check the trees of several requests, and set their answers.

        No cache is cut before all verdicts are there: if a verifier fails, all trees can be checked again, one by one.
        """
        decided = list[Tensor]()
        for group in grouped(checks, lambda one: len(one.tree), self.lean.most):
            passes = [tree_pass(one.request.target, one.tree, one.request.cache).placed() for one in group]
            decided += map(_decision, group, self.run(passes))
        numbers, found, end = torch.cat(decided).tolist(), list[tuple[Verdict, list[int]]](), 0  # the only host read
        for one in checks:
            start, end = end, end + len(one.tree) + 2
            last, bonus, *tokens = numbers[start:end]
            verifier = one.request.verifier
            with inside(verifier):
                verdict = checked_verdict(verifier, verifier.verdict(last, bonus, one.tree), one.tree, self.lean.vocabulary)
            found.append((verdict, [*(tokens[node] for node in verdict.path[1:]), bonus]))
        for one, answer in zip(checks, found, strict=True):
            one.request.cache.keep(one.request.cache.length, answer[0].path)
            one.answer = answer

    def draft(self, calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
        """Run routines side by side: the first pass of each as one, then the second, and so on.

        Routines that do the same work are captured as a whole.
        """
        keys = {(call.routine.function, call.ours, call.routine.key) for call in calls}
        if len(keys) == 1 and sum(call.routine.widest for call in calls) <= self.lean.most:
            program = self._program_of(calls)
            if program is not None:
                return self._captured(program, calls)
        sizes = [len(call.state) for call in calls]
        states = torch.tensor([number for call in calls for number in call.state], device=self.device).split(sizes)
        works = [call.begin(state, *call.given) for call, state in zip(calls, states, strict=True)]

        def run(wanted: Sequence[tuple[int, Pass]]) -> list[Rows]:
            fixed, found = all(calls[number].ours for number, _ in wanted), list[Rows]()
            passes = [one if calls[number].ours else clamped(one) for number, one in wanted]
            groups = list(grouped(passes, len, self.lean.most))
            for group in groups:
                found += self.run(group, fixed, copy=len(groups) > 1)
            return found

        return side_by_side(works, run)

    def _program_of(self, calls: Sequence[Call]) -> Program | None:
        """Return the program of calls of equal routines, which serves any caches. None if it cannot be captured."""
        routine, count = calls[0].routine, len(calls)
        longest = rounded(max(call.routine.cache.capacity for call in calls), SLOTS)
        where = addresses([call.routine.cache for call in calls], self.anchor, count)

        def build(backend: str) -> Program:
            states = [number for call in calls for number in call.routine.state]
            tables = (torch.tensor(numbers, device=self.device) for numbers in (states, where))
            examples = [torch.stack(each) for each in zip(*(call.routine.inputs for call in calls), strict=True)]
            kept: list[Layout] = []  # a graph does not keep them alive
            fn = partial(self._side_by_side, calls[0], count, longest, kept)
            return self._engine.capture(fn, [*tables, *examples], backend, kept)

        key = ("drafts", count, longest, routine.function, *routine.key)
        if key in self._failed:
            return None
        try:
            return self._engine.program(key, self.lean, build)
        except Exception as error:  # of a plugin's code, or of one that does what only its own cache can
            log.warning("drafts of %s run pass by pass: %s", routine.function.__qualname__, line(str(error)))
            self._failed.add(key)
            return None

    def _captured(self, program: Program, calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
        """Run calls by their program."""
        where = addresses([call.routine.cache for call in calls], self.anchor, len(calls))
        given = [torch.stack(each) for each in zip(*(call.given for call in calls), strict=True)]
        outputs = [out.clone() for out in program([number for call in calls for number in call.state], where, *given)]
        return [tuple(out[number] for out in outputs) for number in range(len(calls))]

    def _side_by_side(
        self, call: Call, count: int, longest: int, kept: list[Layout], states: Tensor, where: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Run `count` calls of equal routines as a function of device tensors, for capture."""
        lean, works = self.lean, []
        for number, state in enumerate(states.view(count, -1)):
            cache: Any = _Elsewhere(self, where, number, longest)
            mine = replace(call, routine=replace(call.routine, cache=cache))
            works.append(mine.begin(state, *(each[number] for each in given)))

        def run(wanted: Sequence[tuple[int, Pass]]) -> list[Rows]:
            passes = [one if call.ours else clamped(one, where[3 * number + 2]) for number, one in wanted]
            shape = Shape(sum(map(len, passes)), count, max(one.at + len(one) for one in passes), longest)
            layout = self._layout(shape, passes, fixed=call.ours)
            kept.append(layout)
            tokens_Q, base_B, offset_B = (torch.cat([getattr(one, name) for one in passes]) for name in _OF_PASSES)
            outputs = _pass(lean, self.anchor, self.kv_heads, longest, tokens_Q, where, base_B, offset_B, *layout.tensors())
            return self._split(passes, (*outputs, tokens_Q))

        found = side_by_side(works, run)
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    def run(self, passes: Sequence[Pass], fixed: bool = True, copy: bool = False) -> list[Rows]:
        """Run passes of at most `LeanText.most` rows and REQUESTS requests together as one.

        Args:
            passes: The passes, each of another cache. Their rows fit.
            fixed: Whether nobody changes the tensors `depths_Q` and `seen_QT` once they are made.
            copy: Copy the results, for a caller that runs another pass before it reads them.
        """
        shape = Shape.of(passes)
        program = self._engine.program(("batch", *shape), self.lean, partial(self._build, shape))
        layout = self._layout(shape, passes, fixed)
        there = self._last.get(shape)
        self._last[shape] = program, layout
        tables = [None] * 6 if there is not None and there[0] is program and there[1] is layout else layout.tensors()
        spare, extra = shape.requests - len(passes), shape.rows - sum(map(len, passes))
        tokens_Q = [one.tokens_Q for one in passes]
        if all(tokens.device.type == "cpu" for tokens in tokens_Q):  # of steps without a draft: one copy for all
            given: Any = [token for tokens in tokens_Q for token in tokens.tolist()] + [0] * extra
        else:
            given = torch.cat([*(tokens.to(self.device) for tokens in tokens_Q), *self._zeros(extra)])
        where = addresses([one.cache for one in passes], self.anchor, shape.requests)
        bases, offsets = (self._numbers([getattr(one, name) for one in passes], spare) for name in ("base", "offset"))
        outputs = program(given, where, bases, offsets, *tables)
        parts = [*outputs, program.inputs[0]]
        return self._split(passes, [part.clone() for part in parts] if copy else parts)

    def _split(self, passes: Sequence[Pass], outputs: Sequence[Tensor]) -> list[Rows]:
        """Divide the results of a joined pass among its passes: logits, hidden states and tokens."""
        (logits_QV, *hidden, tokens_Q), found, end = outputs, list[Rows](), 0
        for one in passes:
            start, end = end, end + len(one)
            rows = _rows([part[start:end] for part in hidden])
            found.append(Scored(rows, self.lean.logits, self.lean.ops.top, logits_QV[start:end], tokens_Q[start:end]))
        return found

    def _build(self, shape: Shape, backend: str) -> Program:
        """Make the program of a shape. Its example inputs are all padding, which reads and writes no cache."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.device)
        blocks = blocks_for(shape.rows, shape.requests, self.group)
        inputs = [
            zeros(shape.rows),
            zeros(shape.requests * 3),
            zeros(shape.requests),
            zeros(shape.requests),
            torch.full((shape.rows,), -1, dtype=torch.int32, device=self.device),
            *(zeros(shape.rows) for _ in range(3)),
            zeros(shape.rows, shape.path),
            torch.zeros(blocks, 3, dtype=torch.int32, device=self.device),
        ]
        return self._engine.capture(partial(_pass, self.lean, self.anchor, self.kv_heads, shape.longest), inputs, backend)

    def _frame(self, shape: Shape, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the tables of `frame_of`, cached."""
        if (shape, counts) not in self._frames:
            if len(self._frames) >= LAYOUTS:
                self._frames.clear()
            self._frames[shape, counts] = frame_of(shape, counts, self.group, self.device)
        return self._frames[shape, counts]

    def _numbers(self, values: Sequence[int | Tensor], spare: int) -> Tensor | list[int]:
        """Join integers, on the host if all are there, or (1,) tensors on the device; add zeros for spare requests."""
        if all(isinstance(value, int) for value in values):
            return [*map(int, values), *[0] * spare]
        each = [value if isinstance(value, Tensor) else torch.tensor([value], device=self.device) for value in values]
        return torch.cat([*each, *self._zeros(spare)])

    def _zeros(self, count: int) -> list[Tensor]:
        """Return a tensor of zeros as padding; nothing for none."""
        return [torch.zeros(count, dtype=torch.int64, device=self.device)] if count else []

    def _layout(self, shape: Shape, passes: Sequence[Pass], fixed: bool) -> Layout:
        """Make the layout of passes, or return the one that was made of the same shapes before."""
        key = (shape, *((len(one), one.at, _key(one.depths_Q), _key(one.seen_QT)) for one in passes))
        if fixed and key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key][0]
        layout = layout_of(shape, passes, self._frame(shape, tuple(map(len, passes))))
        if fixed and not capturing(self.device):  # hold the tensors too, so that no others get their ids
            self._layouts[key] = layout, [(one.depths_Q, one.seen_QT) for one in passes]
            if len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        return layout


class _Elsewhere:
    """Stands for a cache whose place a captured routine reads from the device."""

    def __init__(self, batch: Batch, where: Tensor, number: int, capacity: int) -> None:
        self.batch, self.where, self.number, self.capacity = batch, where, number, capacity

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """Do as `KVCache.move`."""
        batch = self.batch
        heads = len(batch.lean.layers) * batch.kv_heads
        batch.lean.ops.move(batch.anchor, self.where, self.number, base_1, path_D.contiguous(), heads, batch.lean.width)


def _pass(
    lean: LeanText, anchor: Tensor, kv_heads: int, longest: int, tokens_Q: Tensor, where: Tensor, base_B: Tensor,
    offset_B: Tensor, *tables: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a joined pass as a function of device tensors, for capture. Returns logits (Q, V), and the hidden states."""
    layout = Layout(*tables)
    table_B4 = torch.cat([where.view(-1, 3), base_B[:, None]], 1)
    positions_Q = (base_B + offset_B).index_select(0, layout.request_Q.clamp(min=0)) + layout.depth_Q
    places = Places(Contexts(anchor, table_B4, layout, longest, kv_heads))
    hidden_QD: Any = lean.run(0, lean.enter(tokens_Q), positions_Q, places)
    parts = (hidden_QD,) if isinstance(hidden_QD, Tensor) else (hidden_QD.data, hidden_QD.scale)
    return lean.logits(hidden_QD), *parts


def _rows(parts: Sequence[Tensor]) -> Any:
    """Return hidden states as the lean pass does: a tensor, or rows in 8 bits of data and scales."""
    if len(parts) == 1:
        return parts[0]
    from specvlm.engine.kernels.launch import Narrow

    return Narrow(*parts)


def _decision(check: Check, rows: Any) -> Tensor:
    """Apply a request's penalty and rule: (M + 2,) last accepted node, bonus token, and the tree's tokens."""
    request, tree, logits_MV = check.request, replace(check.tree, tokens=rows.tokens_Q), rows.logits()
    if not is_ours(request.verifier):
        logits_MV = logits_MV.clone()  # other requests' rows share the memory
    dice = torch.empty(0) if check.numbers is None else check.numbers
    key_2 = request.key_2(request.cache.length + 1, logits_MV.device)
    logits_MV = request.penalty(logits_MV, tree)
    context = VerifyContext(tree, logits_MV, _NOBODY, dice.to(logits_MV.device), key_2=key_2)
    with inside(request.verifier):
        return torch.cat([request.verifier.decide(context), tree.tokens])


def _key(value: Tensor | Sequence[int] | None) -> Hashable:
    """Return what two passes with equal tables share."""
    return id(value) if isinstance(value, Tensor) else None if value is None else tuple(value)
