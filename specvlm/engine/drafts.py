"""Drafts of several requests on a GPU, run side by side in joined passes, or captured as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specvlm.engine.batch import Batch, Uncaptured, pass_of_many
from specvlm.engine.contexts import SLOTS, Layout, Shape, addresses, capturing, on_device, rounded
from specvlm.engine.lean import LeanText, run_pass
from specvlm.engine.program import Program
from specvlm.engine.steps import Drafting, clamped, grouped, or_none, side_by_side
from specvlm.models.passes import Call, Pass, Rows
from specvlm.models.pauses import finished

_OF_PASSES = ("tokens_Q", "base", "offset")


def draft(batch: Batch, drafts: Sequence[Drafting]) -> None:
    """Run routines of several requests, and set their answers. A routine that fails gets none: run it alone."""
    with batch.lock:
        for group in grouped(drafts, lambda one: one.call.routine.widest, batch.lean.most):
            calls = [one.call for one in group]
            program = _program_of(batch, calls) if len(set(map(_work_of, calls))) == 1 and len(calls) > 1 else None
            found = _captured(batch, program, calls) if program else _pass_by_pass(batch, calls)
            for one, answer in zip(group, found, strict=True):
                one.answer = answer


def routine_of(lean: LeanText, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run one request's routine as a function of device tensors, for capture."""
    return finished(call.begin(*inputs), lambda one: run_pass(lean, one if call.ours else clamped(one)))


def _work_of(call: Call) -> tuple[object, ...]:
    """Return a key that is equal for routines that do the same work."""
    return call.ours, call.routine.function, *call.routine.key


def _pass_by_pass(batch: Batch, calls: Sequence[Call]) -> list[tuple[Tensor, ...] | None]:
    """Run the first passes of all calls as one, then the second ones, and so on. A call that fails gives None.

    If a joined pass fails, its parts run one by one: the routines have compacted their caches and cannot start again.
    """
    sizes = [len(call.state) for call in calls]
    states = torch.tensor([number for call in calls for number in call.state], device=batch.device).split(sizes)
    works = [or_none(call.begin(state, *call.given)) for call, state in zip(calls, states, strict=True)]

    def run(wanted: Sequence[tuple[int, Pass]]) -> list[Rows | Exception]:
        ours, found = all(calls[number].ours for number, _ in wanted), list[Rows | Exception]()
        passes = [one if calls[number].ours else clamped(one) for number, one in wanted]
        groups = list(grouped(passes, len, batch.lean.most))
        for group in groups:
            try:  # a plugin may read the results of a pass after the next one, and return them
                found += batch.run(group, fixed=ours, copy=not ours or len(groups) > 1)
            except Exception:
                found += [_alone(batch, one) for one in group]
        return found

    return side_by_side(works, run)


def _alone(batch: Batch, one: Pass) -> Rows | Exception:
    """Run one pass. If it raises an exception, return that."""
    try:
        return run_pass(batch.lean, one)
    except Exception as error:
        return error


def _program_of(batch: Batch, calls: Sequence[Call]) -> Program | None:
    """Return the program of calls of equal routines, which serves any caches. None if it cannot be captured."""
    first, count, capacities = calls[0], len(calls), [call.routine.cache.capacity for call in calls]
    longest = rounded(max(capacities), SLOTS)
    shown = longest if first.ours else min(capacities)  # a plugin's passes must fit into each cache

    def build(backend: str) -> Program:
        if backend != batch.engine.backend:
            raise Uncaptured("there are too many programs")
        states = [number for call in calls for number in call.routine.state]
        where = addresses([call.routine.cache for call in calls], batch.anchor, count)
        tables = (torch.tensor(numbers, device=batch.device) for numbers in (states, where))
        examples = [torch.stack(each) for each in zip(*(call.routine.inputs for call in calls), strict=True)]
        kept: list[Layout] = []
        fn = partial(_side_by_side, batch, first, count, (longest, shown), kept)
        # A graph does not keep the layouts and the routine's tables alive.
        return batch.engine.capture(fn, [*tables, *examples], backend, (first.routine.work, kept))

    function = first.routine.function
    what = f"drafts of {function.__qualname__} run pass by pass"
    return batch.captured(("drafts", count, longest, shown, *_work_of(first)), build, what, function)


def _captured(batch: Batch, program: Program, calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """Run calls by their program. Returns the tensors of each."""
    where = addresses([call.routine.cache for call in calls], batch.anchor, len(calls))
    given = [torch.stack(each) for each in zip(*(call.given for call in calls), strict=True)]
    outputs = [out.clone() for out in program([number for call in calls for number in call.state], where, *given)]
    return [tuple(out[number] for out in outputs) for number in range(len(calls))]


def _side_by_side(
    batch: Batch, call: Call, count: int, slots: tuple[int, int], kept: list[Layout], states: Tensor, where: Tensor,
    *given: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `count` calls of equal routines as a function of device tensors, for capture.

    slots: Upper bound on the slots of a cache, and the capacity that the routine sees. kept: Captured layouts are
    appended, for the caller to keep alive.
    """
    device, works, (longest, shown) = batch.device, [], slots
    for number, state in enumerate(states.view(count, -1)):
        cache: Any = _CacheByAddress(batch, where, number, shown)
        mine = replace(call, routine=replace(call.routine, cache=cache))
        works.append(mine.begin(state, *(each[number] for each in given)))

    def run(wanted: Sequence[tuple[int, Pass]]) -> list[Rows]:
        passes = [one if call.ours else clamped(one, where[3 * number + 2]) for number, one in wanted]
        shape = Shape(sum(map(len, passes)), count, max(one.at + len(one) for one in passes), longest)
        layout = batch.layout(shape, passes, fixed=call.ours)
        if capturing(device):
            kept.append(layout)
        parts = ([on_device(getattr(one, name), device).reshape(-1) for one in passes] for name in _OF_PASSES)
        tokens_Q, base_B, offset_B = map(torch.cat, parts)
        numbers = where, base_B, offset_B, *layout.tensors()
        outputs = pass_of_many(batch.lean, batch.anchor, batch.kv_heads, longest, tokens_Q, *numbers)
        return batch.split(passes, (*outputs, tokens_Q))

    found = side_by_side(works, run)
    return tuple(torch.stack(each) for each in zip(*found, strict=True))


class _CacheByAddress:
    """Takes the place of a cache in a captured routine, which reads the cache's address from the device.

    Attributes:
        where: Addresses of the caches of all calls (see `contexts.addresses`).
        number: Number of the call.
        capacity: Slots that the routine sees: no more than the cache has, unless the routine is specvlm's own.
    """

    def __init__(self, batch: Batch, where: Tensor, number: int, capacity: int) -> None:
        self.batch, self.where, self.number, self.capacity = batch, where, number, capacity

    def move(self, base_1: Tensor, path_D: Tensor) -> None:
        """Move rows as `KVCache.move` does."""
        batch = self.batch
        heads = len(batch.lean.layers) * batch.kv_heads
        batch.lean.ops.move(batch.anchor, self.where, self.number, base_1, path_D.contiguous(), heads, batch.lean.width)
