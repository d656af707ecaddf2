"""Shapes that `shape=auto` chooses from."""

from __future__ import annotations

from functools import lru_cache

from specvlm.types import TreeShape
from specvlm.types.chances import best_shape

AUTO = "auto"
ROOT = TreeShape.from_paths([])  # no guesses: plain decoding
STEADY = "chain:5"  # the shape if the loop does not choose one
# An engine that captures compiles a program for each shape and number of requests, so it has fewer shapes.
CHAINS, CAPTURED_CHAINS = (1, 2, 3, 4, 5, 6, 8), (2, 4, 6)
TREES = ((6, 3), (12, 4), (25, 5))  # guesses and depth of trees for few requests
CHANCE = 0.7  # chance of a best guess for which the trees are best


@lru_cache
def shapes_for(captured: bool) -> tuple[TreeShape, ...]:
    """Return every shape that `auto` may choose: no guesses, chains, trees. An engine that captures has fewer."""
    chains = [TreeShape.parse(f"chain:{depth}") for depth in (CAPTURED_CHAINS if captured else CHAINS)]
    return (ROOT, *chains, *(best_shape(guesses, depth, CHANCE) for guesses, depth in TREES[captured:]))
