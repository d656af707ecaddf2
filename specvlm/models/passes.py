"""A forward pass as a value. Whoever needs one yields it, and is sent the rows that come out of it.

The loop, its checks and every drafter are generators of passes, so who runs a pass is for others to decide: an engine may run
it alone or captured, and a scheduler may join it with those of other requests (see `specvlm.decoding.scheduler`).

Shape suffixes: Q rows of a pass, T slots from `base` on, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from specvlm.models.kv_cache import KVCache

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

T = TypeVar("T")
Y = TypeVar("Y")
Guard: TypeAlias = Callable[[], AbstractContextManager[Any]]
Passes: TypeAlias = "Generator[Pass, Any, T]"
Work: TypeAlias = "Generator[Pass | Call, Any, T]"  # of a drafter, which may have a routine run


@dataclass(frozen=True, eq=False)
class Rows:
    """What comes out of a pass.

    Attributes:
        hidden_QD: The last hidden states, normed.
        head: Logits of hidden states.
        best: (Q, count) ids of the highest of some logits, best first.
    """

    hidden_QD: Tensor
    head: Callable[[Tensor], Tensor]
    best: Callable[[Tensor, int], Tensor] = lambda logits_QV, count: logits_QV.topk(count).indices

    def logits(self, last: int = 0) -> Tensor:
        """(Q, V), or those of the `last` rows alone."""
        return self.head(self.hidden_QD[-last:])


@dataclass(frozen=True, eq=False)
class Pass:
    """Rows of text for a model to run, whose keys and values go to the slots from `base + at` on of a cache.

    Attributes:
        tokens_Q: Token ids.
        depths_Q: Position of each row above that of slot `base`.
        seen_QT: Which of the slots from `base` to the last row's own each row attends to; it attends to all before. None: to
            all up to its own.
        base: Of the cache, a number; or (1,) int64 on the device, inside a `Routine`.
        offset: Position minus slot, as `base`.
        at: First slot written, counted from `base`.
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
        """First slot written. Waits for the device where `base` lies there. Raises IndexError outside of the cache."""
        base, at, capacity = int(self.base), self.at, self.cache.capacity
        if base < 0 or not base <= base + at <= capacity - self.tokens_Q.numel():
            raise IndexError(f"a pass to slots from {base + at} on, its cache has {capacity}")
        return base + at

    def placed(self) -> Pass:
        """The same with numbers for `base` and `offset`, read here and now. Raises IndexError as `start` does."""
        base, offset = self.start - self.at, int(self.offset)
        return Pass(self.model, self.cache, self.tokens_Q, self.depths_Q, self.seen_QT, base, offset, self.at)

    def seen(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`seen_QT` there, made out where it is None, and made there: a captured step may wait for no copy."""
        if self.seen_QT is not None:
            return self.seen_QT.to(device, dtype)
        return torch.ones(len(self), self.at + len(self), dtype=dtype, device=device).tril(self.at)


@dataclass(frozen=True, eq=False)
class Routine:
    """Work that a drafter does in every round, on the device alone: captured once by an engine that can, else run as it is.

    `work(model, cache, state, *inputs)` yields passes and returns tensors. It must not read a tensor on the host. It is kept
    for later requests, so nothing of one may be in it but by way of the state and the inputs.

    Attributes:
        work: A function of a module, or a `partial` of one: what is made anew for each request would be captured anew, too.
        key: What it depends on beside model, cache, state and inputs. Equal keys of one function mean equal work.
        widest: Most rows of one of its passes.
        state: Integers that are harmless to run it with: what it then writes must lie behind all rows in use.
        inputs: Tensors to run it with, of the sizes and dtypes that all later ones have.
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
        """Of its work, without what a `partial` gives it."""
        return self.work.func if type(self.work) is partial else self.work

    def __call__(self, state: Sequence[int], *inputs: Tensor | None) -> Call:
        """To be yielded; sent back are the tensors, valid until the routine is called again."""
        return Call(self, tuple(state), inputs)


@dataclass(frozen=True, eq=False)
class Call:
    """A routine to be run.

    Attributes:
        inputs: None where one is what it was when the routine was made.
        guard: Put around all that the routine itself does.
        check: Told of its passes, to raise where one cannot be run.
        ours: Is it a session of specvlm's own that asks for a function of specvlm's own?
    """

    routine: Routine
    state: tuple[int, ...]
    inputs: tuple[Tensor | None, ...]
    guard: Guard = nullcontext
    check: Callable[[Pass], None] = lambda one: None
    ours: bool = False

    @property
    def given(self) -> list[Tensor]:
        return [old if new is None else new for old, new in zip(self.routine.inputs, self.inputs, strict=True)]

    def work(self) -> Passes[tuple[Tensor, ...]]:
        """The call as it is, pass by pass."""
        state = torch.tensor(self.state, device=self.routine.model.head_device)
        return self.begin(state, *self.given, read=state.device.type == "cpu")

    def begin(self, *inputs: Tensor, read: bool = False) -> Passes[tuple[Tensor, ...]]:
        """The routine's work on state and inputs, each stretch of it under the guard. read: may slots be read on the host?"""
        routine = self.routine

        def checked(item: object) -> Pass:
            if not isinstance(item, Pass) or item.cache is not routine.cache or item.model is not routine.model:
                raise TypeError(f"a routine yields passes of its own model and cache alone, got {type(item).__name__}")
            self.check(item)
            if len(item) > routine.widest:
                raise ValueError(f"a routine whose widest pass has {routine.widest} rows yielded one of {len(item)}")
            return item.placed() if read else item

        with self.guard():
            work: Passes[tuple[Tensor, ...]] = driven(routine.work(routine.model, routine.cache, *inputs))
        found = yield from guarded(work, self.guard, checked)
        with self.guard():
            if not isinstance(found, tuple) or not all(isinstance(one, Tensor) for one in found):
                raise TypeError(f"a routine returns a tuple of tensors, got {type(found).__name__}")
        return found


def guarded(work: Generator[Any, Any, T], guard: Guard, checked: Callable[[object], Y]) -> Generator[Y, Any, T]:
    """What a generator yields, `checked`, and what it returns; it runs under the guard, and what it asks for does not."""
    result: Any = None
    while True:
        with guard():
            try:
                item = checked(work.send(result))
            except StopIteration as end:
                return end.value
        result = yield item


def driven(value: Generator[Any, Any, T] | T) -> Generator[Any, Any, T]:
    """The result of a function that may or may not be a generator of passes."""
    if isinstance(value, GeneratorType):
        return (yield from value)
    return value  # type: ignore[return-value]


def finished(work: Generator[Any, Any, T], run: Callable[[Any], Any]) -> T:
    """What a generator of passes comes to, when `run` gives what each yields."""
    try:
        item = next(work)
        while True:
            item = work.send(run(item))
    except StopIteration as end:
        return end.value
