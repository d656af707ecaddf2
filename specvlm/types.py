"""What the parts of a decoding graph hand each other. Needs torch, nothing else.

Shape suffixes: S prompt tokens, N video tokens, K kept video tokens, M tree nodes (root included), V vocabulary,
F frames, P tokens of one frame, A rotary axes (3 for M-RoPE, 1 otherwise), D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens of one video lie in time and space, after the model's own merger.

    `newline` counts tokens that follow the last frame and belong to none (LLaVA-OneVision appends one); they are
    video tokens like the others, last in the order, and can be dropped.
    """

    frames: int
    height: int
    width: int
    newline: int = 0

    def __len__(self) -> int:
        return self.cells + self.newline

    @property
    def per_frame(self) -> int:
        return self.height * self.width

    @property
    def cells(self) -> int:
        return self.frames * self.per_frame


@dataclass(frozen=True, eq=False)
class VideoPrompt:
    """One request: tokens with every placeholder expanded, and the pixels that belong to them.

    tokens (S,) int64 on the host; video_index (N,) the slots of all video tokens, ascending, over all videos;
    grids one a video, lengths adding up to N; videos / images: what the family's vision tower wants, one entry each
    (a dict of tensors; a video from a file has its `origin` there too, a `specvlm.data.codec.Origin`). Text must
    follow the last video token, since that text is what scores the video.
    """

    tokens: Tensor
    video_index: Tensor
    grids: tuple[TokenGrid, ...]
    videos: tuple[dict[str, Any], ...] = ()
    images: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if sum(map(len, self.grids)) != len(self.video_index):
            raise ValueError(f"grids of {[len(g) for g in self.grids]} tokens do not fill {len(self.video_index)} video slots")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def cut(self) -> int:
        """First slot of the text after the last video; 0 without a video. The prefill is split here."""
        return int(self.video_index[-1]) + 1 if len(self.video_index) else 0

    def kept_slots(self, index_K: Tensor) -> Tensor:
        """Slots of the prompt that stay when only the video tokens `index_K` do; ascending."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[self.video_index] = False
        keep[self.video_index[index_K.cpu()]] = True
        return keep.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class KeepSet:
    """Which of `total` video tokens the drafter sees: sorted, unique, in range. Empty means a text-only drafter.

    pool: for mergers, a sparse (K, N) matrix with rows that sum to 1, applied to the drafter's own features; row k
    stands at the position of token index[k]. None is plain selection. note: one line that the user should read, such as what
    the pruner did where its signal told it nothing.
    """

    index: Tensor
    total: int
    pool: Tensor | None = None
    note: str = ""

    def __post_init__(self) -> None:
        index = self.index
        if index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(f"KeepSet.index must be a 1-D int64 tensor, got {tuple(index.shape)} {index.dtype}")
        if len(index) and (index[0] < 0 or index[-1] >= self.total or bool((index[1:] <= index[:-1]).any())):
            raise ValueError(f"KeepSet.index must be sorted, unique and within 0..{self.total - 1}")
        if self.pool is not None and tuple(self.pool.shape) != (len(index), self.total):
            raise ValueError(f"KeepSet.pool must be ({len(index)}, {self.total}), got {tuple(self.pool.shape)}")

    def __len__(self) -> int:
        return len(self.index)

    def cpu(self) -> KeepSet:
        return KeepSet(self.index.cpu(), self.total, None if self.pool is None else self.pool.cpu(), self.note)

    @staticmethod
    def budget(total: int, ratio: float) -> int:
        """Tokens that stay when the share `ratio` is dropped: int(N (1 - ratio)), free of the error of 1 - 0.9 in binary."""
        return math.floor(total * (1 - ratio) + 1e-9)

    @classmethod
    def top(cls, scores_N: Tensor, budget: int) -> KeepSet:
        """The `budget` highest scores; among equals the earlier token wins, on every device."""
        if bool(scores_N.isnan().any()):
            raise ValueError(f"cannot rank {len(scores_N)} video tokens: {int(scores_N.isnan().sum())} of their scores are NaN")
        order = scores_N.sort(descending=True, stable=True).indices
        return cls(order[:budget].sort().values, len(scores_N))

    @classmethod
    def uniform(cls, total: int, budget: int, device: torch.device | str = "cpu") -> KeepSet:
        """`budget` tokens at linspace(0, total - 1), cut to whole numbers; one token is the first.

        In integers, since a float linspace cut to int64 depends on how its last bit was rounded.
        """
        return cls(torch.arange(budget, device=device) * (total - 1) // max(budget - 1, 1), total)

    @classmethod
    def merge(cls, owner_E: Tensor, source_E: Tensor, weight_E: Tensor, total: int) -> KeepSet:
        """A merger's keep set: token `owner` stays where it is and becomes the weighted mean of its sources.

        Entry e says that `source_E[e]` counts with `weight_E[e]` (not negative) towards `owner_E[e]`; entries of one pair add
        up, each owner's weights are scaled to sum to 1. A source may have several owners or none (it is dropped then), an
        owner need not be a source of itself; one whose weights are all 0 keeps its own feature. An owner below 0 is no entry.
        """
        there_E = owner_E >= 0
        owner_E, source_E, weight_E = owner_E[there_E], source_E[there_E], weight_E[there_E].double()
        index_K, row_E = owner_E.unique(return_inverse=True)
        # index_add_ would add in another order each time on a GPU.
        sum_K = weight_E.new_zeros(len(index_K)).index_put_((row_E,), weight_E, accumulate=True)
        row_E = torch.cat([row_E, torch.arange(len(index_K), device=row_E.device)])
        weight_E = torch.cat([weight_E / torch.where(sum_K > 0, sum_K, 1)[row_E[: len(weight_E)]], (sum_K <= 0).double()])
        entries_2E = torch.stack([row_E, torch.cat([source_E, index_K])])
        there_E = weight_E > 0
        pool = torch.sparse_coo_tensor(
            entries_2E[:, there_E], weight_E[there_E].float(), (len(index_K), total), check_invariants=False
        )
        return cls(index_K, total, pool.coalesce())

    @classmethod
    def everything(cls, total: int, device: torch.device | str = "cpu") -> KeepSet:
        return cls(torch.arange(total, device=device), total)


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
            ordered = sorted({tuple(int(r) for r in path) for path in paths}, key=lambda p: (len(p), p))
        except (TypeError, ValueError):
            raise ValueError(f"a tree is a list of lists of child ranks like [[0],[1],[0,0]], got {paths!r}") from None
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
        if head == "chain" and tail.isdigit() and int(tail) > 0:
            return cls.from_paths([[0] * depth for depth in range(1, int(tail) + 1)])
        widths = text.split("x")
        if all(w.isdigit() and int(w) > 0 for w in widths):
            paths: list[list[int]] = []
            level: list[list[int]] = [[]]
            for width in widths:
                level = [[*path, rank] for path in level for rank in range(int(width))]
                paths += level
            return cls.from_paths(paths)
        try:
            return cls.from_paths(json.loads(Path(text).read_text() if text.endswith(".json") else text))
        except (json.JSONDecodeError, OSError, TypeError):
            raise ValueError(f"tree shape {text!r} is none of: paper, chain:5, 4x2x1, [[0],[1],[0,0]], FILE.json") from None

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, best first."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            below[parent].append(node)
        return tuple(tuple(sorted(nodes, key=lambda n: self.ranks[n])) for nodes in below)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes that have children, by depth: each level is one forward pass of the drafter."""
        return tuple(
            tuple(n for n, d in enumerate(self.depths) if d == depth and self.children[n]) for depth in range(self.depth)
        )


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
        return DraftTree(
            self.tokens.to(device), self.parents, None if self.q is None else self.q.to(device), self.varies, self.ranks
        )

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return TreeShape(self.parents, (0,) * len(self)).depths

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
        below: dict[int, list[int]] = {node: [] for node in path}
        for node, parent in enumerate(self.parents):
            if parent in below:
                below[parent].append(node)
        of = {n: self.ranks[n] if self.ranks else at for nodes in below.values() for at, n in enumerate(nodes)}
        tried = ({of[n] for n in below[node]} for node in path)
        widths = (next(rank for rank in range(len(known) + 1) if rank not in known) for known in tried)
        return tuple(of[node] for node in path[1:]), tuple(widths)

    def refused(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of the line of best guesses behind the last node of a path of accepted ones: what the target would not have.

        Nothing where that node is a leaf. Where guesses were drawn, the first drawn is taken for the best.
        """
        line, last = [], path[-1]
        while below := [node for node, parent in enumerate(self.parents) if parent == last]:
            last = min(below, key=lambda node: self.ranks[node] if self.ranks else node)
            line.append(last)
        return tuple(self.tokens[line].tolist()) if line else ()

    @cached_property
    def mask(self) -> Tensor:
        """(M, M) bool on the host: may row attend column? A node sees itself and its ancestors, never a sibling."""
        return self.kept(ancestor_mask)(self.parents)

    def kept(self, made: Callable[..., T]) -> Callable[..., T]:
        """A cached function of shapes; without its cache where this shape will not come back."""
        return made.__wrapped__ if self.varies else made  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
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


@dataclass(frozen=True)
class Step:
    """One round as it happened. tokens: what it adds to the output, stop id included, never past a stop id or the limit.

    Round 0 is the prefill: one token, nothing drafted. drafted: guesses checked, depth: most of them on one path;
    accepted: how many the verifier took (before the output was cut); full: False when a stop id or the limit cut it.
    ranks, widths: of the accepted guesses, and how many were tried behind the root and behind each (`DraftTree.ranks_on`).
    refused: guesses behind the accepted ones that the target did not take (`DraftTree.refused`), of rounds that were not cut.
    times_s: seconds by part, of embed, prefill, prune, draft_prefill, draft, verify, and capture where the engine met a new
    shape; they add up to the time since the step before. keep: what the drafter sees, in the step that started it;
    attention: (N,) what the target's question attends to, in the same step, where `DecodingGraph.record` asks for it.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    depth: int = 0
    accepted: int = 0
    full: bool = True
    times_s: dict[str, float] = field(default_factory=dict)
    keep: KeepSet | None = None
    ranks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    attention: Tensor | None = None
