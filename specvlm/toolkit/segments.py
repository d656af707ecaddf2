"""Split videos into segments and budgets into shares, the first steps of several published pruners.

Shape suffixes: F frames, E = F - 1 adjacent pairs of frames, G groups, P tokens per frame, D feature size.
"""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

ELEMENTS = 1 << 20  # numbers in one slice on a CPU, so that the slice fits its cache


def at_once(device: torch.device) -> int:
    """Return how many numbers to process at once: more on a GPU (256 MiB in float32), to launch few large kernels."""
    return ELEMENTS if device.type == "cpu" else 64 * ELEMENTS


def cosine(a_FD: Tensor, b_FD: Tensor) -> Tensor:
    """Compute cosine similarities over the last axis of two tensors of equal shape, in float32; 0 for a zero vector.

    Works through the first axis in slices that fit a CPU's cache. On a CPU this is several times faster than torch's
    cosine_similarity, and no normalised copy of all features is made.
    """
    step = max(1, at_once(a_FD.device) // max(a_FD[:1].numel(), 1))
    parts = zip(a_FD.split(step), b_FD.split(step), strict=True)
    return torch.cat([(normalize(a.float(), dim=-1) * normalize(b.float(), dim=-1)).sum(-1) for a, b in parts])


def adjacent_cosine(x_FD: Tensor) -> Tensor:
    """Compare each frame with the next by cosine similarity, in float32.

    Args:
        x_FD: (F, D) features of frames, or (F, P, D) features of their tokens.

    Returns:
        (E,) similarities of frames, or (E, P) of the tokens in the same place.
    """
    return cosine(x_FD[:-1], x_FD[1:])


def cuts(similarity_E: Tensor, threshold: float = -1.0, least: int = 1) -> Tensor:
    """Cut a video into segments between dissimilar frames (dynamic segmentation).

    Cuts where the similarity is below `threshold`, and at the `least` - 1 least similar pairs; of equal pairs the
    earlier is cut. This is DySeg of FastVID (arXiv 2503.11187), also used by FlashVID (arXiv 2602.08024). With a
    threshold of -1 it gives the events of METok (arXiv 2506.02850).

    Args:
        similarity_E: (E,) similarity of each frame to the next.
        threshold: Cut where the similarity is below this.
        least: Minimum number of segments. More than one per frame is not possible.

    Returns:
        (E,) bool, true where a segment ends between the two frames of the pair.
    """
    cut_E = similarity_E < threshold
    cut_E[similarity_E.sort(stable=True).indices[: max(least - 1, 0)]] = True
    return cut_E


def spans(cut_E: Tensor) -> list[tuple[int, int]]:
    """Convert cuts (E,), as `cuts` returns them, to segments, each as (first frame, last frame + 1)."""
    starts = [0, *(cut_E.nonzero().flatten() + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(cut_E) + 1], strict=True))


def even_spans(count: int, parts: int) -> list[tuple[int, int]]:
    """Split `count` frames into `parts` spans (first frame, last frame + 1) whose lengths differ by at most one."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def written(share: float) -> Fraction:
    """Convert a share to the exact fraction it is written as: 0.07 becomes 7/100, while 0.07 * 100 exceeds 7."""
    return Fraction(str(share))


def apportion(total: int, sizes_G: Tensor) -> Tensor:
    """Divide `total` in proportion to `sizes_G`, by largest remainders. Ties go to the earlier group.

    Uses exact integer arithmetic. The shares add up to `total`, unless all sizes are 0. No group gets more than its
    size if `total` is at most the sum of the sizes.

    Args:
        total: Number to divide, such as a token budget.
        sizes_G: (G,) whole numbers.

    Returns:
        (G,) int64 shares.
    """
    sizes_G, whole = sizes_G.long(), max(int(sizes_G.sum()), 1)
    share_G = total * sizes_G // whole
    rest_G = total * sizes_G - share_G * whole
    share_G[rest_G.sort(descending=True, stable=True).indices[: total - int(share_G.sum())]] += 1
    return share_G


def spread(count: int, budget: int, device: torch.device | str = "cpu") -> Tensor:
    """Choose `budget` of the numbers 0..count-1: the middle of each of `budget` equal parts.

    Returns:
        (budget,) numbers, ascending. They differ from each other if budget <= count.
    """
    return (2 * torch.arange(budget, device=device) + 1) * count // max(2 * budget, 1)


def block_of(height: int, width: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Divide a grid of cells into blocks, each represented by its middle cell.

    Blocks have `side` x `side` cells, fewer at the bottom and right edges of the grid.

    Returns:
        (height * width,) index of the middle cell of each cell's block, in raster order.
    """

    def middle(count: int) -> Tensor:
        start = torch.arange(count, device=device) // side * side
        return (start + (start + side).clamp(max=count) - 1) // 2

    return (middle(height)[:, None] * width + middle(width)).flatten()
