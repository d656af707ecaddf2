"""Cache results across requests: tensors by shape, with copies to detect and undo writes to them, and texts by key."""

from collections import OrderedDict
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
    """Return a decorator that caches the results of a function of hashable arguments, such as shapes.

    Callers must not write to the tensors in a result. The uncached function is `__wrapped__`.

    Args:
        most: Maximum number of results to keep. None keeps all, for tensors whose addresses a captured graph holds.
    """

    def decorated(made: F) -> F:
        @lru_cache(most)
        def kept(*shape: Any) -> Any:
            found = made(*shape)
            _COPIES.extend((ref(leaf), leaf.clone()) for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
            return found

        @wraps(made)
        def remembering(*shape: Any) -> Any:
            with _LOCK:  # if two threads made the same entry, a graph could hold the address of the one dropped
                return kept(*shape)

        remembering.cache_clear, remembering.cache_info = kept.cache_clear, kept.cache_info  # type: ignore[attr-defined]
        remembering.__wrapped__ = made  # uncached, for shapes that vary; torch.compile calls it too
        return remembering  # type: ignore[return-value]

    return decorated


@torch.inference_mode()  # tensors made in inference mode cannot be written to outside of it
def restored() -> bool:
    """Restore the cached tensors that were written to, from their copies; returns whether there were any."""
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


class KeptTexts:
    """Cache of texts that are slow to compute. A key must contain everything that its text depends on.

    Args:
        most: Maximum number of texts. Beyond it, the least recently used one is dropped.
        longest: Maximum number of characters of a key and of a text. Longer ones are not cached.
    """

    def __init__(self, most: int, longest: int) -> None:
        self.most, self.longest = most, longest
        self._lock, self._texts = RLock(), OrderedDict[str, str]()

    def get(self, key: str | None, make: Callable[[], str]) -> str:
        """Return the cached text of `key`, or call `make` and cache its result. With key None, nothing is cached."""
        if key is None or len(key) > self.longest:
            return make()
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
                return self._texts[key]
        text = make()
        with self._lock:
            if len(text) <= self.longest:
                self._texts[key] = text
            while len(self._texts) > self.most:
                self._texts.popitem(last=False)
        return text
