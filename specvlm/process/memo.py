"""Tensors that are made once a shape and kept from request to request, with copies that tell whether they were written to."""

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import RLock
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

F = TypeVar("F", bound=Callable[..., Any])

_LOCK = RLock()
_COPIES: list[tuple[ref[Tensor], Tensor]] = []


def remembered(most: int | None = None) -> Callable[[F], F]:
    """A cached function of shapes, whose tensors are never to be written to. `__wrapped__` makes them anew.

    Args:
        most: how many results are kept; None for all, as captured steps need that know the addresses.
    """

    def decorated(made: F) -> F:
        @lru_cache(most)
        def kept(*shape: Any) -> Any:
            found = made(*shape)
            _COPIES.extend((ref(leaf), leaf.clone()) for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
            return found

        @wraps(made)
        def remembering(*shape: Any) -> Any:
            with _LOCK:  # of two threads that make the same, one would have what is not kept; a graph keeps addresses alone
                return kept(*shape)

        remembering.cache_clear, remembering.cache_info = kept.cache_clear, kept.cache_info  # type: ignore[attr-defined]
        remembering.__wrapped__ = made  # what varies is made without a copy; torch.compile looks through a cache, too
        return remembering  # type: ignore[return-value]

    return decorated


@torch.inference_mode()  # else those that a request made cannot be written to
def restored() -> bool:
    """Put back what was written to; was there any?"""
    with _LOCK:
        _COPIES[:] = [pair for pair in _COPIES if pair[0]() is not None]
        pairs = list(_COPIES)
    changed = False
    for made, copy in pairs:
        tensor = made()
        if tensor is not None and not torch.equal(tensor, copy):
            tensor.copy_(copy)
            changed = True
    return changed
