"""A video as tokens, a request about it, and which of the tokens the drafter sees.

Shape suffixes: S prompt tokens, N video tokens, K kept video tokens, E entries of a merger.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    (a dict of tensors; a video from a file has its `origin` there too, a `specvlm.video.codec.Origin`). Text must
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

    def copy(self, pixels: bool = True) -> VideoPrompt:
        """One that shares nothing with this; without `pixels` one that has none."""

        def of(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else copy(value)

        videos, images = (
            tuple({key: of(value) for key, value in part.items()} for part in parts) if pixels else ()
            for parts in (self.videos, self.images)
        )
        return VideoPrompt(self.tokens.clone(), self.video_index.clone(), tuple(map(copy, self.grids)), videos, images)

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
        """Tokens that stay when the share `ratio` is dropped: floor(N (1 - ratio)), for N below 2^22.

        Free of the error of 1 - 0.9 in binary: of 480 tokens 48 stay, where the released SpecVLM's int(480 * (1 - 0.9)) is 47.
        """
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
        shape, there = (len(index_K), total), (entries_2E[:, there_E], weight_E[there_E].float())
        return cls(index_K, total, torch.sparse_coo_tensor(*there, shape, check_invariants=False).coalesce())

    @classmethod
    def everything(cls, total: int, device: torch.device | str = "cpu") -> KeepSet:
        return cls(torch.arange(total, device=device), total)
