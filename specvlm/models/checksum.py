"""A checksum of tensors, on whatever device they lie, in one pass over their memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from specvlm.parallel.ranks import local_shard

WORDS = 65_537  # of 8 bytes: words so far apart are summed before they are weighted; prime, as no width of a matrix is
SMALL = 2**16  # bytes


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of every byte and its place, on any device.

    Words of 8 bytes, weighted by their place modulo 65,537, summed modulo 2**64. It takes one pass over the memory, which is
    what a token of plain decoding takes. It is no defence against somebody who computes a change that leaves it as it is.
    """
    small: dict[torch.device, list[Tensor]] = {}  # one after the other: a pass over each would take longer than reading it
    parts: dict[torch.device, list[tuple[int, Tensor]]] = {}
    weights = cache(_weights)  # for this call alone: between calls they could be written to
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
    """() int64 each, of bytes: of whole rows of words, of the words behind them, of the bytes behind those."""
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # else it is no row of words
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
    """(count,) odd numbers, all different; their products wrap around."""
    return torch.arange(count, device=device) * 0x1E3779B97F4A7C16 + 0x5851F42D4C957F2D
