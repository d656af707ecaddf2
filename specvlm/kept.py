"""Tensors that are made once a shape and kept from request to request, with copies that tell whether they were written to."""

from __future__ import annotations

from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor | tuple[Tensor, ...])

_COPIES: list[tuple[ref[Tensor], Tensor]] = []


def kept(made: T) -> T:
    """The same, copied on the side. For what is never written to once it is made."""
    if not torch.compiler.is_compiling():
        _COPIES.extend((ref(tensor), tensor.clone()) for tensor in ((made,) if isinstance(made, Tensor) else made))
    return made


def restored() -> bool:
    """Put back what was written to; was there any?"""
    _COPIES[:] = [pair for pair in _COPIES if pair[0]() is not None]
    changed = False
    for made, copy in _COPIES:
        tensor = made()
        if tensor is not None and not torch.equal(tensor, copy):
            tensor.copy_(copy)
            changed = True
    return changed
