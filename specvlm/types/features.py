"""Features of models with DeepStack: the rows that enter the language model, and those that are added inside it.

Shape suffixes: N rows, L levels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a model with DeepStack (arXiv 2406.04334). They are indexed and assigned like a tensor of N rows.

    Attributes:
        rows: (N, D) rows that enter the first layer.
        added: (N, L, D) rows that are added to the outputs of the first L layers.
    """

    rows: Tensor
    added: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Features:
        return Features(self.rows[index], self.added[index])

    def __setitem__(self, index: Any, values: Features) -> None:
        self.rows[index], self.added[index] = values.rows, values.added

    @property
    def device(self) -> torch.device:
        """Device of both parts."""
        return self.rows.device

    def to(self, dtype: torch.dtype) -> Features:
        """Convert both parts to a dtype."""
        return Features(self.rows.to(dtype), self.added.to(dtype))


def entering(values: Tensor | Features) -> Tensor:
    """Return the (N, D) rows that enter the first layer."""
    return values.rows if isinstance(values, Features) else values


def joined(parts: Sequence[Tensor | Features]) -> Tensor | Features:
    """Concatenate rows. All parts must have the same type."""
    if isinstance(parts[0], Features):
        pairs = [(part.rows, part.added) for part in parts if isinstance(part, Features)]
        return Features(*(torch.cat(same) for same in zip(*pairs, strict=True)))
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def merged(pool_KN: Tensor, values: Tensor | Features) -> Tensor | Features:
    """Merge N rows into K, and added rows likewise, by a matrix of weights that may be sparse (see `KeepSet.pool`)."""
    if isinstance(values, Features):
        pool_KN = pool_KN.to(values.rows)
        added = (pool_KN @ values.added.flatten(1)).unflatten(1, values.added.shape[1:])
        return Features(pool_KN @ values.rows, added)
    return pool_KN.to(values) @ values
