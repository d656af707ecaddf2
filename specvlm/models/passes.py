"""Forward passes as values: a generator yields a `Pass` and is sent the resulting `Rows`.

The decoding loop, its checks and the drafters that run a model are such generators, so they leave open how a pass
runs. An engine may run the pass alone or replay a captured graph, and a scheduler may batch it with passes of other
requests (see `specvlm.decoding.scheduler`).

Shape suffixes: Q rows of a pass, T slots from `base` on, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from specvlm.models.kv_cache import KVCache

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

T = TypeVar("T")
Y = TypeVar("Y")
Guard: TypeAlias = Callable[[], AbstractContextManager[Any]]
Passes: TypeAlias = "Generator[Pass, Any, T]"
Jobs: TypeAlias = "Generator[Job, Any, T]"
Work: TypeAlias = "Generator[Pass | Call, Any, T]"  # a drafter's generator, which may also yield calls of a `Routine`


class Job(Protocol):
    """What a request asks its engine to run: a `Pass`, or a step of the engine's own."""

    @property
    def model(self) -> VideoLM:
        """The model that runs it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Result of a pass.

    Attributes:
        hidden_QD: (Q, D) last hidden states, after the final norm.
        head: Maps hidden states to logits.
        best: Maps (Q, V) logits and a count to (Q, count) ids of the highest, best first.
    """

    hidden_QD: Tensor
    head: Callable[[Tensor], Tensor]
    best: Callable[[Tensor, int], Tensor] = lambda logits_QV, count: logits_QV.topk(count).indices

    def logits(self, last: int = 0) -> Tensor:
        """Compute the logits (Q, V) of all rows, or of only the last ones if `last`, their number, is not 0."""
        return self.head(self.hidden_QD[-last:])


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass over text tokens, one per row, which writes their keys and values to slots from `base + at` on.

    Attributes:
        model: Model to run.
        cache: KV cache of the model.
        tokens_Q: (Q,) token ids.
        depths_Q: (Q,) rotary position of each row, relative to that of slot `base`.
        seen_QT: (Q, T), whether a row attends to a slot, for the slots from `base` to that of the last row. Every row
            attends to all slots before `base`. None: causal.
        base: Slot from which `at` and `seen_QT` count: a number, or inside a `Routine` (1,) int64 on the device.
        offset: Position minus slot (`KVCache.offset`), of the same type as `base`.
        at: First slot to write, relative to `base`.
    """

    model: VideoLM
    cache: KVCache
    tokens_Q: Tensor
    depths_Q: Sequence[int] | Tensor
    seen_QT: Tensor | None
    base: int | Tensor
    offset: int | Tensor
    at: int = 0

    def __len__(self) -> int:
        return self.tokens_Q.numel()

    @property
    def start(self) -> int:
        """First slot to write. Waits for the device if `base` is a tensor there.

        Raises IndexError if the rows do not fit into the cache.
        """
        base, at, capacity = int(self.base), self.at, self.cache.capacity
        if base < 0 or not base <= base + at <= capacity - self.tokens_Q.numel():
            raise IndexError(f"a pass to slots from {base + at} on, its cache has {capacity}")
        return base + at

    def placed(self) -> Pass:
        """Copy the pass, with `base` and `offset` read to the host. Raises IndexError if its rows do not fit."""
        base, offset = self.start - self.at, int(self.offset)
        return Pass(self.model, self.cache, self.tokens_Q, self.depths_Q, self.seen_QT, base, offset, self.at)

    def seen(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the mask (Q, T) on a device. A causal one is made there: a captured step cannot wait for a copy."""
        if self.seen_QT is not None:
            return self.seen_QT.to(device, dtype)
        return torch.ones(len(self), self.at + len(self), dtype=dtype, device=device).tril(self.at)


@dataclass(frozen=True, eq=False)
class Routine:
    """Work that a drafter repeats every round on the device; an engine that captures graphs captures it once per cache.

    `work(model, cache, state, *inputs)` yields passes and returns a tuple of tensors. It must not read tensors on the
    host. Later requests reuse the capture, so data of a request may only enter through the state and the inputs.

    Attributes:
        work: A module-level function, or a `partial` of one. A function made per request would be captured per request.
        key: Everything that `work` depends on besides model, cache, state and inputs. With one function, equal keys
            mean equal work.
        model: Model of its passes.
        cache: Cache of its passes.
        widest: Maximum number of rows of a pass.
        state: Integers for the runs that warm up and capture, which must write only to slots that are not in use.
        inputs: Example tensors. Those of later calls must have the same shapes and dtypes.
    """

    work: Callable[..., Passes[tuple[Tensor, ...]]]
    key: tuple[Hashable, ...]
    model: VideoLM
    cache: KVCache
    widest: int
    state: tuple[int, ...]
    inputs: tuple[Tensor, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """The function that `work` is, or is a `partial` of."""
        return self.work.func if type(self.work) is partial else self.work

    def __call__(self, state: Sequence[int], *inputs: Tensor | None) -> Call:
        """Make a call for a drafter to yield. The tensors it is sent are valid until the routine's next call."""
        return Call(self, tuple(state), inputs)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a routine, to be run by an engine.

    Attributes:
        routine: Routine to run.
        state: Integers passed to the routine.
        inputs: Tensors passed to the routine. Each None stands for the routine's own input.
        guard: Makes a context manager, entered whenever the routine's own code runs: several times, never nested.
        check: Called with each pass of the routine; raises if the pass cannot run.
        ours: Whether the drafter, its session and the function all belong to specvlm.
        joins: Whether its passes may run together with those of other requests, which changes their rounding. False if
            guesses affect what is sampled.
    """

    routine: Routine
    state: tuple[int, ...]
    inputs: tuple[Tensor | None, ...]
    guard: Guard = nullcontext
    check: Callable[[Pass], None] = lambda one: None
    ours: bool = False
    joins: bool = False

    @property
    def given(self) -> list[Tensor]:
        """Inputs of this call, with the routine's own input in place of each None."""
        return [old if new is None else new for old, new in zip(self.routine.inputs, self.inputs, strict=True)]

    def work(self) -> Passes[tuple[Tensor, ...]]:
        """Run the call uncaptured, pass by pass."""
        state = torch.tensor(self.state, device=self.routine.model.head_device)
        return self.begin(state, *self.given, read=state.device.type == "cpu")

    def begin(self, *inputs: Tensor, read: bool = False) -> Passes[tuple[Tensor, ...]]:
        """Run the routine under the guard, yielding its checked passes, and return its tensors.

        inputs: The state, then the tensors. read: Read slots to the host (not while capturing).
        Raises TypeError or ValueError if the routine yields or returns something invalid.
        """
        routine = self.routine

        def checked(item: object) -> Pass:
            """Return a yielded pass, placed if `read`. Raises if the routine may not yield it."""
            if type(item) is not Pass or item.cache is not routine.cache or item.model is not routine.model:
                raise TypeError(f"a routine yields only passes of its own model and cache, got {type(item).__name__}")
            self.check(item)
            if (rows := item.tokens_Q.numel()) > routine.widest:
                raise ValueError(f"a routine whose widest pass has {routine.widest} rows yielded one of {rows}")
            return item.placed() if read else item

        guard = self.guard()
        with guard:
            work: Passes[tuple[Tensor, ...]] = driven(routine.work(routine.model, routine.cache, *inputs))
        found = yield from guarded(work, guard, checked)
        with guard:
            if not isinstance(found, tuple) or not all(isinstance(one, Tensor) for one in found):
                raise TypeError(f"a routine returns a tuple of tensors, got {type(found).__name__}")
        return found


def guarded(
    work: Generator[Any, Any, T], guard: AbstractContextManager[Any], checked: Callable[[object], Y]
) -> Generator[Y, Any, T]:
    """Drive a generator under a guard; outside the guard, yield its items as `checked` returns them.

    guard: Entered whenever the generator's code runs: several times, never nested.
    """
    result: Any = None
    while True:
        with guard:
            try:
                item = checked(work.send(result))
            except StopIteration as end:
                return end.value
        result = yield item


def driven(value: Generator[Any, Any, T] | T) -> Generator[Any, Any, T]:
    """Run a generator of passes and return its result; return any other value as it is, without a pass."""
    if isinstance(value, GeneratorType):
        return (yield from value)
    return value  # type: ignore[return-value]
