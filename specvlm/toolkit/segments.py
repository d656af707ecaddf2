"""Frames in segments, and budgets in shares: what several published pruners do first. For authors of pruners.

Shape suffixes: F frames, E = F - 1 neighbouring pairs of frames, G groups, D width.
"""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

ELEMENTS = 1 << 20  # numbers handled at once: what a processor's cache holds


def at_once(device: torch.device) -> int:
    """How many numbers to handle at once. Elsewhere than on a CPU 64 times as many, 256 MB: few large kernels."""
    return ELEMENTS if device.type == "cpu" else 64 * ELEMENTS


def cosine(a_FD: Tensor, b_FD: Tensor) -> Tensor:
    """Cosine over the last axis of two tensors of one shape, in float32; 0 where either vector is.

    In slices of the first axis: several times faster than torch's own on a CPU, whose cache they fit, and no copy of all the
    features is made.
    """
    step = max(1, at_once(a_FD.device) // max(a_FD[:1].numel(), 1))
    parts = zip(a_FD.split(step), b_FD.split(step), strict=True)
    return torch.cat([(normalize(a.float(), dim=-1) * normalize(b.float(), dim=-1)).sum(-1) for a, b in parts])


def adjacent_cosine(x_FD: Tensor) -> Tensor:
    """Cosine of each frame to the next, over the last axis: (F, D) to (E,), (F, P, D) to (E, P). In float32."""
    return cosine(x_FD[:-1], x_FD[1:])


def cuts(similarity_E: Tensor, threshold: float = -1.0, least: int = 1) -> Tensor:
    """(E,) bool, dynamic segmentation: between which frames a new segment begins.

    Where the similarity is below `threshold`, and at the `least` - 1 least similar pairs, so that there are at least
    that many segments (or as many as frames). Among equals the earlier pair is cut. DySeg of FastVID (arXiv
    2503.11187), which FlashVID (arXiv 2602.08024) takes over; with a threshold of -1, the events of METok (2506.02850).
    """
    cut_E = similarity_E < threshold
    cut_E[similarity_E.sort(stable=True).indices[: max(least - 1, 0)]] = True
    return cut_E


def spans(cut_E: Tensor) -> list[tuple[int, int]]:
    """The segments that cuts make, each as (first frame, one past its last)."""
    starts = [0, *(cut_E.nonzero().flatten() + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(cut_E) + 1], strict=True))


def even_spans(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` frames in `parts` (at most `count`) runs whose lengths differ by one at most."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def written(share: float) -> Fraction:
    """A share as it is written, to count by exactly: 0.07 of 100 is 7, where the product of floats is more."""
    return Fraction(str(share))


def apportion(total: int, sizes_G: Tensor) -> Tensor:
    """`total` shared out in proportion to whole numbers `sizes_G`: largest remainders, among equals the earlier group.

    Adds up to `total`, and gives no group more than its size, where `total` is at most the sum of all sizes. In whole numbers.
    """
    sizes_G, whole = sizes_G.long(), max(int(sizes_G.sum()), 1)
    share_G = total * sizes_G // whole
    rest_G = total * sizes_G - share_G * whole
    share_G[rest_G.sort(descending=True, stable=True).indices[: total - int(share_G.sum())]] += 1
    return share_G


def spread(count: int, budget: int, device: torch.device | str = "cpu") -> Tensor:
    """`budget` of 0..count-1, at the middles of as many equal parts; ascending and unique."""
    return (2 * torch.arange(budget, device=device) + 1) * count // max(2 * budget, 1)


def block_of(height: int, width: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """(P,) the middle cell of the block that each cell lies in; blocks of `side` x `side` cells, cut off at the edge."""

    def middle(count: int) -> Tensor:
        start = torch.arange(count, device=device) // side * side
        return (start + (start + side).clamp(max=count) - 1) // 2

    return (middle(height)[:, None] * width + middle(width)).flatten()
