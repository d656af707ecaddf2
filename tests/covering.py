"""Few crossings of independent choices, for tests that would repeat themselves if they took all."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import pytest


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


def sampled(*choices: Sequence[Any], pairs: bool = False) -> list[Any]:
    """Return parameters of all crossings; those beyond a sample, in which each option is met, are marked exhaustive.

    pairs: Not of all crossings, but of those of `covering`.
    """
    places = [range(len(options)) for options in choices]
    cases = covering(*places) if pairs else list(product(*places))
    left = {(choice, at) for choice, options in enumerate(choices) for at in range(len(options))}
    found = []
    for case in _turning(cases, [len(options) for options in choices]):
        new = left.intersection(enumerate(case))
        left -= new
        values = [options[at] for options, at in zip(choices, case, strict=True)]
        found.append((case, pytest.param(*values, marks=() if new else pytest.mark.exhaustive)))
    return [param for _, param in sorted(found, key=lambda one: cases.index(one[0]))]


def _turning(cases: list[tuple[int, ...]], sizes: list[int]) -> list[tuple[int, ...]]:
    """Put the crossings first in which all choices turn at once, so that few meet every option; each shifts in its own way."""
    turned = [[(turn + choice * (turn // size)) % size for turn in range(max(sizes))] for choice, size in enumerate(sizes)]
    first = list(zip(*turned, strict=True))
    return [*(case for case in first if case in cases), *(case for case in cases if case not in first)]
