"""Bounds on how far two orders of summing the same numbers may differ, on any processor with any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rounding(terms: int, size: float, dtype: torch.dtype = torch.float64) -> float:
    """Bound the difference of two sums of the same numbers: `terms * eps * size`.

    A sum of n numbers, in whatever order, is off by at most n * eps / 2 * sum(|x|) (Higham, Accuracy and Stability of
    Numerical Algorithms, 4.2), and two sums may be off to either side. The same holds for an inner product.

    Args:
        terms: Numbers added up; of sums of sums, all that go into one value. A product or a division counts as one.
        size: Sum of their magnitudes, not that of the result, which may be near 0. Of a mean, or of any sum whose
            weights add up to 1, the largest magnitude.
        dtype: Dtype of the sums.
    """
    return terms * torch.finfo(dtype).eps * size


def assert_same_sums(actual: Tensor, expected: Tensor, terms: int, size: Tensor | float | None = None) -> None:
    """Fail if an element differs by more than rounding can explain.

    Args:
        actual, expected: The coarser of their dtypes counts.
        terms: See `rounding`.
        size: See `rounding`; of a tensor its largest magnitude. None takes that of `expected`, and allows every element
            what the largest is allowed: right for rows of a model, wrong where all elements may cancel.
    """
    size = expected if size is None else size
    size = float(size.abs().max()) if isinstance(size, Tensor) else size
    dtype = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    atol = rounding(terms, size, dtype)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def additions(model: nn.Module, keys: int) -> int:
    """Count the terms of a value after a whole model: the columns of every matrix, and `keys` in every attention."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    attentions = [name for name, _ in model.named_modules() if name.endswith("attn")]
    return sum(matrix[0].numel() for matrix in matrices) + keys * len(attentions)
