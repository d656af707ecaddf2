"""Video token grids, prompts, and the set of video tokens that the drafter sees.

Shape suffixes: S prompt tokens, N video tokens, K kept video tokens, E entries of a merge.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specvlm.types.pixels import LateVideo


@dataclass(frozen=True)
class TokenGrid:
    """Layout of one video's tokens in time and space, as the language model gets them.

    Attributes:
        frames: Number of frames in the grid. Each may stand for several frames of the clip (2 in Qwen2.5-VL).
        height: Rows of tokens per frame.
        width: Columns of tokens per frame.
        newline: Tokens after the last frame that belong to no frame (LLaVA-OneVision appends one). They count as video
            tokens, come last, and can be dropped.
    """

    frames: int
    height: int
    width: int
    newline: int = 0

    def __len__(self) -> int:
        return self.cells + self.newline

    @property
    def per_frame(self) -> int:
        """Tokens per frame."""
        return self.height * self.width

    @property
    def cells(self) -> int:
        """Tokens of all frames, without newline tokens."""
        return self.frames * self.per_frame


@dataclass(frozen=True, eq=False)
class VideoPrompt:
    """One prompt: token ids with every placeholder expanded, and the pixels that belong to them.

    Text must follow the last video token, since the attention of that text scores the video tokens.

    Attributes:
        tokens: (S,) int64, on the host.
        video_index: (N,) slots (indices in `tokens`) of all video tokens, ascending, over all videos.
        grids: One per video; their lengths add up to N.
        videos: One dict of tensors per video, the inputs of the family's vision tower. A video read from a file also
            has its `origin`, a `specvlm.video.codec.Origin`.
        images: One dict of tensors per image.
        image_index: (I,) slots of all image tokens, ascending, over all images.

    Raises:
        ValueError: The grids' lengths do not add up to N.
    """

    tokens: Tensor
    video_index: Tensor
    grids: tuple[TokenGrid, ...]
    videos: tuple[dict[str, Any], ...] = ()
    images: tuple[dict[str, Any], ...] = ()
    image_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if sum(map(len, self.grids)) != len(self.video_index):
            raise ValueError(f"grids of {[len(g) for g in self.grids]} tokens do not fill {len(self.video_index)} video slots")

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self, pixels: bool = True) -> VideoPrompt:
        """Copy the prompt and its tensors. pixels: False leaves out the videos and images."""

        def of(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else copy(value)

        def copied(part: dict[str, Any]) -> dict[str, Any]:
            return part.copy() if isinstance(part, LateVideo) else {key: of(value) for key, value in part.items()}

        videos, images = (tuple(map(copied, parts)) if pixels else () for parts in (self.videos, self.images))
        index, grids = (self.video_index.clone(), self.image_index.clone()), tuple(map(copy, self.grids))
        return VideoPrompt(self.tokens.clone(), index[0], grids, videos, images, index[1])

    @property
    def items(self) -> list[dict[str, Any]]:
        """Videos and images in the order of their slots; none for a copy without pixels."""
        if not self.videos and not self.images:
            return []
        found, ends = [], {"video": 0, "image": 0}
        sizes = [("video", len(grid), video) for grid, video in zip(self.grids, self.videos, strict=True)]
        for kind, size, item in [*sizes, *(("image", int(image["tokens"]), image) for image in self.images)]:
            index = self.video_index if kind == "video" else self.image_index
            found.append((int(index[ends[kind]]), item))
            ends[kind] += size
        return [item for _, item in sorted(found, key=lambda pair: pair[0])]

    @property
    def cut(self) -> int:
        """First slot of the text after the last video, where the prefill is split. 0 without a video."""
        return int(self.video_index[-1]) + 1 if len(self.video_index) else 0

    @property
    def joints(self) -> list[int]:
        """First slot after each video. The prefill starts a new pass there, so that prompts can share earlier rows."""
        ends = torch.tensor([len(grid) for grid in self.grids], dtype=torch.int64).cumsum(0)
        return (self.video_index[ends - 1] + 1).tolist()

    @property
    def text(self) -> int:
        """First slot after the last video or image: from here on there is only text."""
        return max((int(index[-1]) + 1 for index in (self.video_index, self.image_index) if len(index)), default=0)

    def kept_slots(self, index_K: Tensor) -> Tensor:
        """Return the slots that remain if only the video tokens `index_K` are kept; ascending, on the host."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[self.video_index] = False
        keep[self.video_index[index_K.cpu()]] = True
        return keep.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class KeepSet:
    """Video tokens that the drafter sees. With an empty set, it sees no video.

    Attributes:
        index: (K,) int64 indices of the kept tokens: sorted, unique, within 0..total-1.
        total: N, the number of video tokens.
        pool: For merging, a sparse (K, N) matrix whose rows sum to 1, applied to the drafter's own features; row k
            takes the position of token index[k]. None: plain selection.
        note: One line to show the user, such as what the pruner did when its signal was uninformative.

    Raises:
        ValueError: `index` is not as described, or `pool` has another shape. The values of `pool` are not checked.
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
        """Copy the keep set to the host."""
        return KeepSet(self.index.cpu(), self.total, None if self.pool is None else self.pool.cpu(), self.note)

    @staticmethod
    def budget(total: int, ratio: float) -> int:
        """Number of tokens kept when the share `ratio` of N is dropped: floor(N (1 - ratio)), exact for N below 2^22.

        Corrects the binary rounding of 1 - ratio: keeps 48 of 480 tokens at a ratio of 0.9, where int(480 * (1 - 0.9)),
        as in the released SpecVLM, gives 47.
        """
        return math.floor(total * (1 - ratio) + 1e-9)

    @classmethod
    def top(cls, scores_N: Tensor, budget: int) -> KeepSet:
        """Keep the `budget` tokens with the highest scores. Ties go to the earlier token, on every device.

        Args:
            scores_N: (N,) score of each video token.
            budget: Tokens to keep.

        Raises:
            ValueError: A score is NaN.
        """
        if bool(scores_N.isnan().any()):
            raise ValueError(f"cannot rank {len(scores_N)} video tokens: {int(scores_N.isnan().sum())} of their scores are NaN")
        order = scores_N.sort(descending=True, stable=True).indices
        return cls(order[:budget].sort().values, len(scores_N))

    @classmethod
    def uniform(cls, total: int, budget: int, device: torch.device | str = "cpu") -> KeepSet:
        """Keep `budget` evenly spaced tokens: linspace(0, total - 1, budget) rounded down. A budget of 1 keeps token 0.

        Uses integer arithmetic, since truncating a float linspace depends on how its last bit was rounded.
        """
        return cls(torch.arange(budget, device=device) * (total - 1) // max(budget - 1, 1), total)

    @classmethod
    def merge(cls, owner_E: Tensor, source_E: Tensor, weight_E: Tensor, total: int) -> KeepSet:
        """Merge tokens: each token that owns others is kept, and its feature becomes the weighted mean of its sources'.

        Entry e says that token owner_E[e] takes in token source_E[e]. Weights of equal entries add up, and each owner's
        weights are scaled to sum to 1. A source may have several owners; tokens that own none are dropped. An owner
        need not be among its own sources. An owner whose weights are all 0 keeps its own feature.

        Args:
            owner_E: (E,) token that takes in the source; entries below 0 are ignored.
            source_E: (E,) token whose feature is taken in.
            weight_E: (E,) weight of the source, not negative.
            total: N, the number of video tokens.
        """
        there_E = owner_E >= 0
        owner_E, source_E, weight_E = owner_E[there_E], source_E[there_E], weight_E[there_E].double()
        index_K, row_E = owner_E.unique(return_inverse=True)
        # index_add_ adds in a nondeterministic order on a GPU.
        sum_K = weight_E.new_zeros(len(index_K)).index_put_((row_E,), weight_E, accumulate=True)
        row_E = torch.cat([row_E, torch.arange(len(index_K), device=row_E.device)])
        weight_E = torch.cat([weight_E / torch.where(sum_K > 0, sum_K, 1)[row_E[: len(weight_E)]], (sum_K <= 0).double()])
        entries_2E = torch.stack([row_E, torch.cat([source_E, index_K])])
        there_E = weight_E > 0
        shape, there = (len(index_K), total), (entries_2E[:, there_E], weight_E[there_E].float())
        return cls(index_K, total, torch.sparse_coo_tensor(*there, shape, check_invariants=False).coalesce())

    @classmethod
    def everything(cls, total: int, device: torch.device | str = "cpu") -> KeepSet:
        """Keep all `total` video tokens."""
        return cls(torch.arange(total, device=device), total)
