"""Noise as a pure function of a request's seed, an index in the answer and a token id, for coupled sampling.

Shape suffixes: N rows, V vocabulary.
"""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), as signed integers.
STEP = 0x9E3779B97F4A7C15 - 2**64
FACTORS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def gumbel(key_2: Tensor, vocabulary: int, ahead_N: Tensor | None = None) -> Tensor:
    """Compute independent standard Gumbel numbers for tokens of an answer, without reading a tensor on the host.

    Equal seed, index and token id give equal noise, for any number of rows and any vocabulary. So two models share the
    noise of all ids that both know.

    Args:
        key_2: (2,) int64: the request's seed, and the index of a token in the answer.
        vocabulary: Number of ids, from 0 on.
        ahead_N: (N,) int64: added to that index to give the index of each row's token. None: one row, for the index
            itself.

    Returns:
        (N, V) float64, on the device of the key.
    """
    index_N = key_2[1:] if ahead_N is None else key_2[1:] + ahead_N
    rows_N = _mixed(_mixed(key_2[:1]) + index_N * STEP)
    ids_V = torch.arange(1, vocabulary + 1, device=key_2.device) * STEP
    bits_NV = _mixed(rows_N[:, None] + ids_V)
    uniform_NV = (_shifted(bits_NV, 12).double() + 0.5) * 2.0**-52  # strictly between 0 and 1
    return uniform_NV.log_().neg_().log_().neg_()


def _mixed(bits: Tensor) -> Tensor:
    """Map int64 numbers one to one to numbers that look random; multiplication wraps around."""
    bits = (bits ^ _shifted(bits, 30)) * FACTORS[0]
    bits = (bits ^ _shifted(bits, 27)) * FACTORS[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift right without copying the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)
