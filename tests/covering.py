"""Few crossings of independent choices, for tests that would repeat themselves if they took all."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any


def covering(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return crossings in which any two options of different choices meet. A fault of any two of them is seen."""
    every = list(product(*(range(len(options)) for options in choices)))
    left = {pair for case in every for pair in _pairs(case)}
    found = []
    while left:
        best = max(every, key=lambda case: len(left.intersection(_pairs(case))))
        left.difference_update(_pairs(best))
        found.append(tuple(options[at] for options, at in zip(choices, best, strict=True)))
    return found


def _pairs(case: Sequence[int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    return combinations(enumerate(case), 2)
