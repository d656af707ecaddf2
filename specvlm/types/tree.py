"""Draft trees and the verifier's verdict on them.

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
MOST_GUESSES, DEEPEST = 1024, 128  # limits on a tree, far above any size that was ever worth its cost
LONGEST_FILE = 1_000_000  # maximum size in bytes of a .json file that holds a tree


@dataclass(frozen=True)
class TreeShape:
    """Shape of a static draft tree, without tokens. It does not change during a run, so derived values are cached.

    Attributes:
        parents: (M,) parent of each node, parents[i] < i. Node 0 is the root, with parent -1.
        ranks: (M,) node i is the drafter's `ranks[i]`-th best guess below its parent, counted from 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def from_paths(cls, paths: list[list[int]]) -> TreeShape:
        """Build a shape from its nodes, each written as the ranks on its path from the root: [[0], [1], [0, 0]].

        Raises:
            ValueError: A node's parent is missing, a rank is negative or not an int, or the tree has more than
                MOST_GUESSES nodes or DEEPEST levels below the root.
        """
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
        """Parse `paper`, `chain:5`, `4x2x1` (children per node, by level), a JSON list of nodes, or a .json file.

        Raises:
            ValueError: The text is none of these, the file cannot be opened or is not JSON, or the nodes do not form a
                tree within the limits (see `from_paths`).
            UserError: The file is longer than LONGEST_FILE, or not a regular file.
        """
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
        """(M,) depth of each node; the root has 0."""
        return depths_of(self.parents)

    @property
    def depth(self) -> int:
        """Depth of the deepest node; the root has 0."""
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """(M,) child nodes of each node, best guess first."""
        return tuple(tuple(sorted(nodes, key=lambda n: self.ranks[n])) for nodes in children_of(self.parents))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes with children, one tuple per depth from 0. One forward pass of the drafter finds a level's children."""
        return tuple(
            tuple(n for n, d in enumerate(self.depths) if d == depth and self.children[n]) for depth in range(self.depth)
        )


@lru_cache(256)
def depths_of(parents: tuple[int, ...]) -> tuple[int, ...]:
    """Return the (M,) depth of each node; the root has 0."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return tuple(depths)


def children_of(parents: tuple[int, ...]) -> list[list[int]]:
    """List the child nodes of each node, in ascending order. Nodes of parent -1 are roots; there may be several."""
    below: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            below[parent].append(node)
    return below


def _check_size(guesses: int, depth: int) -> None:
    """Raise ValueError for a tree of more than MOST_GUESSES nodes or DEEPEST levels below the root."""
    if guesses > MOST_GUESSES or depth > DEEPEST:
        most = f"at most {MOST_GUESSES} guesses, {DEEPEST} deep"
        raise ValueError(f"the shape of a tree has {most}; this one has {guesses:.4g} and is {depth:.4g} deep")


def _json(text: str) -> object:
    """Parse JSON text, or the .json file that it names. Returns None if it cannot be opened or is not JSON."""
    try:
        return json_of(read_bytes(Path(text), LONGEST_FILE) if text.endswith(".json") else text)
    except UserError:
        raise
    except (OSError, ValueError):
        return None


def _number(text: str) -> int:
    """Parse a whole number of at most 18 plain digits; returns 0 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def _rank(value: object) -> int:
    """Return `value` if it is an int, else raise TypeError."""
    if type(value) is not int:
        raise TypeError(value)
    return value


# mc_sim_7b_63, the static tree of EAGLE-1 that SpecVLM drafts with: 25 nodes below the root (4/8/8/3/2 by depth) and
# 15 leaves.
PAPER_TREE = [[0], [1], [2], [3]]
PAPER_TREE += [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0]]
PAPER_TREE += [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0]]
PAPER_TREE += [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Draft tree of one round. Node 0 is the last accepted token.

    Attributes:
        tokens: (M,) token of each node.
        parents: (M,) parent of each node, parents[i] < i.
        q: (M, V), row i is the distribution from which the children of node i were drawn, without replacement and in
            ascending order of node. Rows of leaves are unused. None when the children are not random (top-k, prompt
            lookup).
        varies: Whether the shape changes every round while the number of nodes stays the same. Caches keyed by shape
            are then bypassed.
        ranks: (M,) rank of each node among its parent's best guesses, from 0. None: siblings are listed best first,
            without gaps.
    """

    tokens: Tensor
    parents: tuple[int, ...]
    q: Tensor | None = None
    varies: bool = False
    ranks: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.parents)

    def to(self, device: torch.device) -> DraftTree:
        """Move the tree to a device; returns `self` if it is there already."""
        if self.tokens.device == device and (self.q is None or self.q.device == device):
            return self
        q = None if self.q is None else self.q.to(device)
        return DraftTree(self.tokens.to(device), self.parents, q, self.varies, self.ranks)

    def on_host(self) -> DraftTree:
        """Copy the tree to the host for a `Step`. `q` is not copied: an empty tensor shows that there was one."""
        q = None if self.q is None else torch.empty(len(self), 0)
        return DraftTree(torch.tensor(self.tokens.tolist()), self.parents, q, self.varies, self.ranks)

    @property
    def depths(self) -> tuple[int, ...]:
        """(M,) depth of each node; the root has 0."""
        return depths_of(self.parents)

    def way_to(self, node: int) -> tuple[int, ...]:
        """Return the nodes on the path from the root to `node`, both included."""
        way = [node]
        while self.parents[way[-1]] >= 0:
            way.append(self.parents[way[-1]])
        return tuple(reversed(way))

    def ranks_on(self, path: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ranks and widths along a path of accepted nodes, for statistics of the draft.

        Args:
            path: Accepted nodes, root first.

        Returns:
            The rank of each guess on the path; and the width of each node on the path: w if the guesses of ranks 0 to
            w - 1 below it are in the tree, and that of rank w is not. Both are empty if guesses were drawn at random,
            since such guesses have no rank.
        """
        if self.q is not None:
            return (), ()
        below = children_of(self.parents)
        of = {n: self.ranks[n] if self.ranks else at for nodes in below for at, n in enumerate(nodes)}
        tried = ({of[n] for n in below[node]} for node in path)
        widths = (next(rank for rank in range(len(known) + 1) if rank not in known) for known in tried)
        return tuple(of[node] for node in path[1:]), tuple(widths)

    def refused(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens of the best guesses that follow an accepted path and were rejected.

        They are found by going from the last node of `path` to its best child, and on to a leaf; none if that node is a
        leaf. If guesses were drawn at random, the first one drawn counts as the best.
        """
        line, last, below = [], path[-1], children_of(self.parents)
        while below[last]:
            last = min(below[last], key=lambda node: self.ranks[node] if self.ranks else node)
            line.append(last)
        return tuple(self.tokens[line].tolist()) if line else ()

    @cached_property
    def mask(self) -> Tensor:
        """(M, M) bool attention mask on the host: a node (row) attends to itself and its ancestors, not to siblings."""
        return self.kept(ancestor_mask)(self.parents)

    def kept(self, made: Callable[..., T]) -> Callable[..., T]:
        """Return `made`, or its uncached function if the shape changes every round.

        made: A function of shapes decorated with `remembered`.
        """
        return made.__wrapped__ if self.varies else made  # type: ignore[attr-defined]


@remembered(64)
def ancestor_mask(parents: tuple[int, ...]) -> Tensor:
    """Return an (M, M) bool mask, read-only since it is cached: entry (i, j) is set if j is i or an ancestor of i."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


@dataclass(frozen=True)
class Verdict:
    """The verifier's decision on a draft tree.

    Attributes:
        path: Accepted nodes, root first, on the host.
        bonus: The target's own next token after them.
    """

    path: tuple[int, ...]
    bonus: int

    @property
    def accepted(self) -> int:
        """Number of accepted draft tokens, not counting the bonus token. Its mean over rounds is the paper's tau."""
        return len(self.path) - 1
