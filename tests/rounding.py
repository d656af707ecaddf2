"""How far two ways of adding up the same numbers may lie apart, on any processor and with any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rounding(terms: int, size: float, dtype: torch.dtype = torch.float64) -> float:
    """The most by which two sums of the same numbers can differ: `terms * eps * size`.

    A sum of n numbers, in whatever order, is off by at most n * eps / 2 * sum(|x|) (Higham, Accuracy and Stability of Numerical
    Algorithms, 4.2), and two of them lie on either side. The same holds for an inner product.

    Args:
        terms: numbers that are added up; of sums of sums, all on the way of one value. A product or a division counts as one.
        size: what their magnitudes add up to, the result apart, which may be near 0. Of a mean, or of any sum whose weights
            add up to 1, the largest magnitude.
        dtype: in which they are added up.
    """
    return terms * torch.finfo(dtype).eps * size


def assert_same_sums(actual: Tensor, expected: Tensor, terms: int, size: Tensor | float | None = None) -> None:
    """Fail where an element differs by more than rounding can explain.

    Args:
        actual, expected: the coarser of their dtypes counts.
        terms: see `rounding`.
        size: see `rounding`; of a tensor its largest magnitude. None for that of `expected`, of whose elements each is then
            allowed what the largest is: right for the rows of a model, wrong where all of them may cancel.
    """
    size = expected if size is None else size
    size = float(size.abs().max()) if isinstance(size, Tensor) else size
    dtype = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    atol = rounding(terms, size, dtype)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def additions(model: nn.Module, keys: int) -> int:
    """Terms of a value that has come through a whole model: the columns of every matrix, and `keys` in every attention."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    attentions = [name for name, _ in model.named_modules() if name.endswith("attn")]
    return sum(matrix[0].numel() for matrix in matrices) + keys * len(attentions)
