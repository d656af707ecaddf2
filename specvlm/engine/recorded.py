"""Record the torch operations of a function once, to run them again without the Python code between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Slot(int):
    """Number of a tensor that is an input or the result of an operation."""


class Recorded(TorchDispatchMode):
    """Records the operations that `fn` runs on the given inputs. When called, it runs them again on other inputs.

    Other tensors, such as weights and caches, stay the same objects, as in a CUDA graph.

    Raises:
        RuntimeError: `fn` reads a tensor on the host.
    """

    def __init__(self, fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any], tuple[_Slot | None, ...]]] = []
        self._slots: dict[int, _Slot] = {}  # by the tensor's id
        self._alive: list[Tensor] = []  # while recording, so that no two have the same id
        for value in inputs:
            self._number(value)
        with self:
            outputs = fn(*inputs)
        self._outputs = self._numbered(list(outputs))
        self._slots, self._alive = {}, []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # operations in place must not change the constant
            func = torch.ops.aten.lift_fresh_copy.default
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{func} reads a tensor on the host")
        found = func(*args, **(kwargs or {}))
        if isinstance(found, bool | int | float):  # from values or from a shape? Its parts tell: reading values raises
            with self:
                func.decompose(*args, **(kwargs or {}))
            return found
        given = self._numbered(args), self._numbered(kwargs or {})
        self._steps.append((func, *given, tuple(map(self._number, tree_leaves(found)))))
        return found

    def _number(self, value: object) -> _Slot | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._slots:
            self._slots[id(value)] = _Slot(len(self._alive))
            self._alive.append(value)
        return self._slots[id(value)]

    def _numbered(self, values: Any) -> Any:
        """Replace tensors by their slots, if they have one."""
        return tree_map(lambda value: self._slots.get(id(value), value) if isinstance(value, Tensor) else value, values)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        known: dict[_Slot, Any] = {_Slot(number): value for number, value in enumerate(inputs)}

        def filled(values: Any) -> Any:
            return tree_map(lambda value: known[value] if isinstance(value, _Slot) else value, values)

        for func, args, kwargs, slots in self._steps:
            found = tree_leaves(func(*filled(args), **filled(kwargs)))
            known.update((slot, value) for slot, value in zip(slots, found, strict=True) if slot is not None)
        return list(filled(self._outputs))
