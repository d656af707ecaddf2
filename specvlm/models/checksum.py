"""Checksum of tensors on any device, in one pass over their memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from specvlm.parallel.ranks import local_shard

WORDS = 65_537  # number of weights: words (8 bytes) this far apart share one. Prime, unlike any matrix width
SMALL = 2**16  # bytes; smaller tensors are concatenated and summed together


def checksum(tensors: Iterable[Tensor]) -> int:
    """Compute a checksum that depends on every byte and its position. Skips tensors on meta.

    Sums 8-byte words modulo 2**64, each weighted by its position modulo WORDS and, for large tensors, by the tensor's
    number. Costs one pass over the memory, as much as about one token of plain decoding. It detects accidental changes,
    not ones designed to keep the checksum.
    """
    small: dict[torch.device, list[Tensor]] = {}  # summed together: launching kernels for each would cost more
    parts: dict[torch.device, list[tuple[int, Tensor]]] = {}
    weights = cache(_weights)  # cached for this call only: a strategy could write to them between calls
    for number, tensor in enumerate(tensors):
        if tensor.device.type == "meta":
            continue
        flat = local_shard(tensor).detach().contiguous().flatten().view(torch.uint8)
        if len(flat) < SMALL:
            small.setdefault(tensor.device, []).append(flat)
        else:
            parts.setdefault(tensor.device, []).extend((number + 1, part) for part in _sums(flat, weights))
    for device, flats in small.items():
        parts.setdefault(device, []).extend((0, part) for part in _sums(torch.cat(flats), weights))
    total = 0
    for found in parts.values():
        values = torch.stack([part for _, part in found]).tolist()
        total += sum((2 * number + 1) * value for (number, _), value in zip(found, values, strict=True))
    return total % 2**64


def _sums(flat: Tensor, weights: Callable[[int, torch.device], Tensor]) -> Iterator[Tensor]:
    """Yield weighted sums of a byte tensor as int64 scalars: of full rows of WORDS words, other words, other bytes."""
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # viewing bytes as words needs alignment
    count = len(flat) // 8
    words, rest = flat[: count * 8].view(torch.int64), flat[count * 8 :]
    rows = count // WORDS
    if rows:
        yield (words[: rows * WORDS].view(rows, WORDS).sum(0) * weights(WORDS, flat.device)).sum()
    if count % WORDS:
        yield (words[rows * WORDS :] * weights(count % WORDS, flat.device)).sum()
    if len(rest):
        yield (rest * weights(len(rest), flat.device)).sum()


def _weights(count: int, device: torch.device) -> Tensor:
    """Return (count,) int64 weights, odd and distinct. They and the products wrap around."""
    return torch.arange(count, device=device) * 0x1E3779B97F4A7C16 + 0x5851F42D4C957F2D
