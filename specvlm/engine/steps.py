"""Steps that requests ask a capturing engine to run, and functions that combine those of several requests.

Shape suffixes: Q rows of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from specvlm.engine.base import Submitted
from specvlm.models.host_copy import HostCopy
from specvlm.models.passes import Call, Pass, Passes, Rows
from specvlm.strategies.fence import is_ours
from specvlm.types import Verdict

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

T = TypeVar("T")
R = TypeVar("R")
REQUESTS = 16  # maximum number of requests of a pass


@dataclass(eq=False)
class Check(Submitted):
    """A tree for the target to check. The engine answers with the verdict and the new tokens.

    Attributes:
        numbers: Uniform random numbers for the verifier, if it needs any.
        answer: The answer, once there is one. If a step fails, those that ran with it are repeated one by one, except
            those with an answer: a step changes its request's cache, so it must not run twice.
        waits: Whether the engine may wait for the answer. False: it only starts the check.
        decided: The decision, which is being copied to the host, once the check has started.
    """

    numbers: Tensor | None = None
    answer: tuple[Verdict, list[int]] | None = None
    waits: bool = True
    decided: HostCopy | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None or (self.decided is not None and self.decided.done)

    @property
    def model(self) -> VideoLM:
        """The model that runs it."""
        return self.request.target

    @cached_property
    def follows(self) -> bool:
        """Whether the argmax of each node's logits decides the check (`Verifier.follow`)."""
        request = self.request
        return request.penalty.factor == 1 and is_ours(request.verifier) and request.verifier.follows


@dataclass(eq=False)
class Drafting:
    """A call of a drafter's routine. The engine answers with the routine's tensors.

    Attributes:
        call: The call.
        mark: As in `Engine.call`.
        answer: As in `Check`.
    """

    call: Call
    mark: Callable[[str], None]
    answer: Sequence[Tensor] | None = None

    @property
    def model(self) -> VideoLM:
        """The model that runs it."""
        return self.call.routine.model


@dataclass(frozen=True, eq=False)
class Scored(Rows):
    """Result of a joined pass, whose logits were computed in it.

    Attributes:
        logits_QV: (Q, V) logits of all rows. Another pass of as many rows overwrites them.
        tokens_Q: (Q,) tokens on the device; overwritten too.
    """

    logits_QV: Tensor = field(default_factory=Tensor)
    tokens_Q: Tensor = field(default_factory=Tensor)

    def logits(self, last: int = 0) -> Tensor:
        return self.logits_QV[-last:]


def grouped(items: Sequence[T], rows: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Divide items, in order, into groups that fit into a pass of `most` rows and REQUESTS requests."""
    group, total = list[T](), 0
    for item in items:
        if group and (total + rows(item) > most or len(group) == REQUESTS):
            yield group
            group, total = [], 0
        group.append(item)
        total += rows(item)
    if group:
        yield group


def clamped(one: Pass, capacity: Tensor | None = None) -> Pass:
    """Clamp the slots of a plugin's pass to its cache, since the host cannot check values on the device.

    capacity: Slots of the cache, if only the device knows them.
    """
    most = (one.cache.capacity if capacity is None else capacity) - one.at - len(one)
    if isinstance(most, int) and isinstance(one.base, int):
        return replace(one, base=min(max(one.base, 0), most))
    return replace(one, base=torch.as_tensor(one.base).clamp(min=0).clamp(max=most))


def side_by_side(
    works: Sequence[Passes[R]], run: Callable[[Sequence[tuple[int, Pass]]], Sequence[Rows | Exception]]
) -> list[R]:
    """Run generators of passes in lockstep: run all passes that they yield, then resume them. Returns their results.

    run: Maps (generator's number, its pass) pairs to the rows of each pass, or to an exception for that generator.
    """
    found: dict[int, R] = {}
    answers: dict[int, Rows | Exception | None] = dict.fromkeys(range(len(works)))
    while answers:
        wanted = list[tuple[int, Pass]]()
        for number, rows in answers.items():
            work = works[number]
            try:
                wanted.append((number, work.throw(rows) if isinstance(rows, Exception) else work.send(rows)))
            except StopIteration as end:
                found[number] = end.value
        each = run(wanted) if wanted else []
        answers = {number: rows for (number, _), rows in zip(wanted, each, strict=True)}
    return [found[number] for number in range(len(works))]


def or_none(work: Passes[R]) -> Passes[R | None]:
    """Run a generator of passes and return its result, or None if it fails."""
    try:
        return (yield from work)
    except Exception:
        return None
