"""Steps that several papers share, as plain loops, and videos to test them on. Nothing here calls the package.

Shape suffixes: F frames, P tokens per frame, D width, N = F P.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import exp, floor, sqrt

import torch
from torch import Tensor

KINDS = ("random", "still", "scenes", "walk", "ties")
WIDTH = 8  # a power of two, so that means over it are exact


def cosine(a_D: Tensor, b_D: Tensor) -> float:
    a_D, b_D = a_D.double(), b_D.double()
    return float(a_D @ b_D / (a_D.norm() * b_D.norm()))


def dpc(x_PD: Tensor, members: list[int], count: int, k: int = 7) -> tuple[list[int], dict[int, int]]:
    """Return the centres in order, and the centre of every member.

    density = exp(-mean squared distance to the k nearest, itself included). score = density times the distance to the
    nearest denser one, or to the furthest one for the densest. Ties go to the earlier.
    """
    if not members or not count:
        return [], {}
    x_PD = x_PD.double()
    square = ((x_PD[:, None] - x_PD[None]).square().sum(-1) / x_PD.shape[1]).tolist()
    density, score = {}, {}
    for i in members:
        near = sorted(square[i][j] for j in members)[:k]
        density[i] = exp(-sum(near) / len(near))
    for i in members:
        denser = [square[i][j] for j in members if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score[i] = density[i] * sqrt(min(denser) if denser else max(square[i][j] for j in members))
    centres = sorted(sorted(members, key=lambda i: (-score[i], i))[:count])
    return centres, {i: i if i in centres else min(centres, key=lambda c: (square[i][c], c)) for i in members}


def shares(total: int, sizes: list[int]) -> list[int]:
    """Split `total` in proportion to sizes, by largest remainders; ties go to the earlier."""
    exact = [Fraction(total * size, max(sum(sizes), 1)) for size in sizes]
    found = [floor(share) for share in exact]
    for i in sorted(range(len(sizes)), key=lambda i: (found[i] - exact[i], i))[: total - sum(found)]:
        found[i] += 1
    return found


def dynamic_segments(x_FPD: Tensor, threshold: float, least: int) -> list[list[int]]:
    """Split frames where the mean features' cosine is below the threshold, and at the `least` - 1 lowest."""
    mean_FD = x_FPD.double().mean(1)
    alike = [round(cosine(a, b), 9) for a, b in pairwise(mean_FD)]
    cut = {i for i, value in enumerate(alike) if value < threshold}
    cut |= set(sorted(range(len(alike)), key=lambda i: (alike[i], i))[: least - 1])
    found = [[0]]
    for frame in range(1, len(x_FPD)):
        if frame - 1 in cut:
            found.append([])
        found[-1].append(frame)
    return found


def mean_pool(rows: dict[int, dict[int, float]], total: int) -> tuple[list[int], Tensor]:
    """Return kept tokens in order, and (K, N) weights with rows of sum 1. rows: sources of each kept token."""
    index = sorted(rows)
    pool = torch.zeros(len(index), total, dtype=torch.float64)
    for row, token in enumerate(index):
        for source, weight in rows[token].items():
            pool[row, source] += weight
    return index, pool / pool.sum(1, keepdim=True)


def videos(count: int = 50, side: int = 4, frames: int = 9) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Yield kind, x_FPD, saliency (N,) and a budget.

    Kinds: random, standing still, alternating scenes, slow change, and full of ties; with one frame, and even and odd
    numbers of frames. Budgets go from 1 to all but one. Videos with ties hold whole numbers in vectors of length 1 or
    2, so that cosines, distances and ties are exact in float32.
    """
    for case in range(count):
        g = torch.Generator().manual_seed(case)
        kind, length, per_frame = KINDS[case % len(KINDS)], 1 + (case * 7 // 5) % frames, side * side
        sign_PD = torch.randint(2, (per_frame, WIDTH), generator=g) * 2.0 - 1
        first_PD = sign_PD * (torch.rand(per_frame, WIDTH, generator=g).argsort(1) < 4)  # of length 2
        if kind == "random":
            x_FPD = torch.randn(length, per_frame, WIDTH, generator=g)
        elif kind == "still":
            x_FPD = first_PD.repeat(length, 1, 1)
        elif kind == "scenes":  # half of the cells turn about
            other_PD = torch.where(torch.arange(per_frame)[:, None] % 2 == 0, first_PD, -first_PD)
            x_FPD = torch.stack([first_PD if (frame // (1 + case % 3)) % 2 == 0 else other_PD for frame in range(length)])
        elif kind == "walk":
            step = torch.randn(length, per_frame, WIDTH, generator=g) * torch.rand(per_frame, 1, generator=g)
            x_FPD = torch.randn(per_frame, WIDTH, generator=g) * 2 + step.cumsum(0) * 0.7
        else:  # the same unit vectors in every frame, in another order
            x_FPD = torch.stack([torch.eye(WIDTH)[torch.randperm(per_frame, generator=g) % WIDTH] for _ in range(length)])
        total = length * per_frame
        saliency = torch.rand(total, generator=g)
        if kind == "ties":
            saliency = torch.randint(1, 4, (total,), generator=g) / 4
        edge = (1, total - 1, length, total // 2)
        yield (
            kind,
            x_FPD,
            saliency,
            edge[case // 5 % 5] if case // 5 % 5 < 4 else 1 + int(torch.randint(total - 1, (1,), generator=g)),
        )
