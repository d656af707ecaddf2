"""Points at which long work may pause, and a function that runs such work to its end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

T = TypeVar("T")
Pauses: TypeAlias = "Generator[Pause, None, T]"


@dataclass(frozen=True)
class Pause:
    """A point at which a prefill may pause, so that a scheduler can run other requests. The engine runs nothing for it.

    Attributes:
        device: Device of the work so far.
        waits: Whether the prefill waits for another request. Then it is no use to resume it before others have run.
        layer: Number of the language model's layers that have run in this pass; 0 outside of them.
        rows: Rows of the pass.
    """

    device: torch.device
    waits: bool = False
    layer: int = 0
    rows: int = 0


def finished(work: Generator[Any, Any, T], run: Callable[[Any], Any] = lambda pause: None) -> T:
    """Run a generator of passes or pauses to its end and return its result.

    run: maps a yielded item to what is sent back.
    """
    try:
        item = next(work)
        while True:
            item = work.send(run(item))
    except StopIteration as end:
        return end.value
