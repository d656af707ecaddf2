"""Chances that the guesses of a tree are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from specvlm.types.tree import TreeShape

# The w best guesses of a drafter miss a share (1 - first) * w ** -SPREAD of the tokens. Used only if no ranks were
# measured. The embedded pairs have 0.3 without video and 1.2 to 2 with it (three clips each), so 0.7 is cautious.
SPREAD = 0.7


def chance_of(first: float, rank: int) -> float:
    """Return the chance that a guess is right, by its rank among the guesses for its place (0 is the best).

    first: The chance of the guess of rank 0.
    """
    return first if rank == 0 else (1 - first) * float(rank**-SPREAD - (rank + 1) ** -SPREAD)


def expected(shape: TreeShape, first: Sequence[float]) -> float:
    """Return the expected number of accepted guesses per round, without the bonus token.

    Args:
        shape: Shape of the tree.
        first: For each depth, the chance that the best guess is right if the guesses above it are.
    """
    reach, total = [1.0], 0.0
    for parent, rank, depth in zip(shape.parents[1:], shape.ranks[1:], shape.depths[1:], strict=True):
        chance = first[depth - 1]
        reach.append(reach[parent] * (chance_of(chance, rank) if rank else chance))
        total += reach[-1]
    return total


@lru_cache(16)
def best_shape(guesses: int, depth: int, first: float) -> TreeShape:
    """Return the tree with the highest number of expected accepted guesses (see `expected`).

    Args:
        guesses: Number of guesses in the tree.
        depth: Maximum depth of a guess.
        first: Chance that the best guess in a place is right, above 0 and below 1; the same at all depths.
    """
    paths, open_ = list[list[int]](), dict[tuple[int, ...], float]()
    open_[0,] = first
    while len(paths) < guesses:
        path = max(open_, key=lambda each: open_[each])
        reach, rank = open_.pop(path), path[-1]
        paths.append([*path])
        open_[*path[:-1], rank + 1] = reach / chance_of(first, rank) * chance_of(first, rank + 1)
        if len(path) < depth:
            open_[*path, 0] = reach * first
    return TreeShape.from_paths(paths)
