"""Guesses as a tree, and what the target made of them.

Shape suffixes: M tree nodes (root included), V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.parsing.files import json_of, read_bytes
from specvlm.process.memo import remembered

T = TypeVar("T")
MOST_GUESSES, DEEPEST = 1024, 128  # of a tree: far more than ever paid
LONGEST_FILE = 1_000_000  # bytes of a tree as JSON


@dataclass(frozen=True)
class TreeShape:
    """A static draft tree as data: parents (M,) with parents[i] < i and node 0 the root, rank[i] = how good a child.

    Node i is the `rank[i]`-th best guess of the drafter below its parent. Everything else is derived and cached on
    the host, since the shape is fixed for a session.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def from_paths(cls, paths: list[list[int]]) -> TreeShape:
        """From nodes written as the ranks on the way down, e.g. [[0], [1], [0, 0]]; every prefix must be there."""
        try:
            _check_size(len(paths), max(map(len, paths), default=0))
            ordered = sorted({tuple(map(_rank, path)) for path in paths}, key=lambda p: (len(p), p))
        except TypeError:
            raise ValueError(f"a tree is a list of lists of child ranks like [[0],[1],[0,0]], got {paths!r:.200}") from None
        number = {(): 0} | {path: i for i, path in enumerate(ordered, start=1)}
        for path in ordered:
            if not path or min(path) < 0 or path[:-1] not in number:
                raise ValueError(f"tree node {list(path)} needs its parent {list(path[:-1])} and ranks from 0")
        return cls((-1, *(number[p[:-1]] for p in ordered)), (0, *(p[-1] for p in ordered)))

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """`paper`, `chain:5`, `4x2x1` (children of every node, a number a level), a list of nodes, or a .json file of one."""
        if text == "paper":
            return cls.from_paths(PAPER_TREE)
        head, _, tail = text.partition(":")
        if head == "chain" and _number(tail) > 0:
            _check_size(_number(tail), _number(tail))
            return cls.from_paths([[0] * depth for depth in range(1, int(tail) + 1)])
        widths = list(map(_number, text.split("x")))
        if all(widths):
            _check_size(sum(accumulate(widths, mul)) if len(widths) <= DEEPEST else 0, len(widths))
            paths: list[list[int]] = []
            level: list[list[int]] = [[]]
            for width in widths:
                level = [[*path, rank] for path in level for rank in range(width)]
                paths += level
            return cls.from_paths(paths)
        found = _json(text)
        if not isinstance(found, list) or not found:
            raise ValueError(f"tree shape {text!r:.200} is none of: paper, chain:5, 4x2x1, [[0],[1],[0,0]], FILE.json")
        return cls.from_paths(found)

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        return depths_of(self.parents)

    @property
    def depth(self) -> int:
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, best first."""
        return tuple(tuple(sorted(nodes, key=lambda n: self.ranks[n])) for nodes in children_of(self.parents))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes that have children, by depth: each level is one forward pass of the drafter."""
        return tuple(
            tuple(n for n, d in enumerate(self.depths) if d == depth and self.children[n]) for depth in range(self.depth)
        )


@lru_cache(256)
def depths_of(parents: tuple[int, ...]) -> tuple[int, ...]:
    """How many nodes lie above each."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return tuple(depths)


def children_of(parents: tuple[int, ...]) -> list[list[int]]:
    """Children of each node, in the order of their numbers."""
    below: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        below[parent].append(node)
    return below


def _check_size(guesses: int, depth: int) -> None:
    if guesses > MOST_GUESSES or depth > DEEPEST:
        most = f"at most {MOST_GUESSES} guesses, {DEEPEST} deep"
        raise ValueError(f"the shape of a tree has {most}; this one has {guesses:.4g} and is {depth:.4g} deep")


def _json(text: str) -> object:
    """What a text or the .json file of that name holds; None where that is no JSON, or cannot be read."""
    try:
        return json_of(read_bytes(Path(text), LONGEST_FILE) if text.endswith(".json") else text)
    except UserError:
        raise
    except (OSError, ValueError):
        return None


def _number(text: str) -> int:
    """A whole number in plain digits; 0 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def _rank(value: object) -> int:
    """Raises TypeError for what is no whole number."""
    if type(value) is not int:
        raise TypeError(value)
    return value


# mc_sim_7b_63, the static tree of EAGLE-1 that SpecVLM drafts with: 25 nodes, 15 leaves, 4/8/8/3/2 by depth.
PAPER_TREE = [[0], [1], [2], [3]]
PAPER_TREE += [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0]]
PAPER_TREE += [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0]]
PAPER_TREE += [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Guesses of one round. tokens (M,), parents (M,) with parents[i] < i; node 0 is the last accepted token.

    q: (M, V) the distribution each node's children were drawn from, in the order of their numbers and without
    replacement (rows of leaves are unused); None when children are not random given the context (top-k, look-up).
    varies: another shape comes in the next round, of as many nodes: what is kept or captured for a shape would be kept in vain.
    ranks: which of its parent's best guesses each node is, from 0; None: siblings come best first, without a gap.
    """

    tokens: Tensor
    parents: tuple[int, ...]
    q: Tensor | None = None
    varies: bool = False
    ranks: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.parents)

    def to(self, device: torch.device) -> DraftTree:
        """Itself, where it is there already."""
        if self.tokens.device == device and (self.q is None or self.q.device == device):
            return self
        q = None if self.q is None else self.q.to(device)
        return DraftTree(self.tokens.to(device), self.parents, q, self.varies, self.ranks)

    def on_host(self) -> DraftTree:
        """A copy for the record. Of `q` only that there is one."""
        q = None if self.q is None else torch.empty(len(self), 0)
        return DraftTree(torch.tensor(self.tokens.tolist()), self.parents, q, self.varies, self.ranks)

    @property
    def depths(self) -> tuple[int, ...]:
        return depths_of(self.parents)

    def way_to(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to `node`, both included."""
        way = [node]
        while self.parents[way[-1]] >= 0:
            way.append(self.parents[way[-1]])
        return tuple(reversed(way))

    def ranks_on(self, path: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a path of accepted nodes, root first, tells of the draft: the rank of each guess on it, and for each node of
        the path how many guesses were tried behind it, the best ones without a gap. Nothing where guesses were drawn: they
        have no rank.
        """
        if self.q is not None:
            return (), ()
        below = children_of(self.parents)
        of = {n: self.ranks[n] if self.ranks else at for nodes in below for at, n in enumerate(nodes)}
        tried = ({of[n] for n in below[node]} for node in path)
        widths = (next(rank for rank in range(len(known) + 1) if rank not in known) for known in tried)
        return tuple(of[node] for node in path[1:]), tuple(widths)

    def refused(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of the line of best guesses behind the last node of a path of accepted ones: what the target would not have.

        Nothing where that node is a leaf. Where guesses were drawn, the first drawn is taken for the best.
        """
        line, last, below = [], path[-1], children_of(self.parents)
        while below[last]:
            last = min(below[last], key=lambda node: self.ranks[node] if self.ranks else node)
            line.append(last)
        return tuple(self.tokens[line].tolist()) if line else ()

    @cached_property
    def mask(self) -> Tensor:
        """(M, M) bool on the host: may row attend column? A node sees itself and its ancestors, never a sibling."""
        return self.kept(ancestor_mask)(self.parents)

    def kept(self, made: Callable[..., T]) -> Callable[..., T]:
        """A cached function of shapes; without its cache where this shape will not come back."""
        return made.__wrapped__ if self.varies else made  # type: ignore[attr-defined]


@remembered(64)
def ancestor_mask(parents: tuple[int, ...]) -> Tensor:
    """(M, M) bool, not to be written to: which nodes, itself among them, lie above a node."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


@dataclass(frozen=True)
class Verdict:
    """What the target made of a tree. path: accepted nodes, root first, on the host; bonus: the target's own next token."""

    path: tuple[int, ...]
    bonus: int

    @property
    def accepted(self) -> int:
        """Accepted draft tokens, the bonus token not counted (the paper's tau)."""
        return len(self.path) - 1
