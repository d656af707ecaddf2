"""Base class and context of pruners, which choose the video tokens that the drafter sees.

Shape suffixes: N video tokens, K kept video tokens, F frames, P tokens of one frame, T text tokens after the video,
D width of the target.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from specvlm.strategies.base import Strategy
from specvlm.strategies.signals import axes_of, signal_of
from specvlm.toolkit.segments import apportion
from specvlm.types import KeepSet, TokenGrid


@dataclass(frozen=True, eq=False)
class PruneContext:
    """Input of a pruner. Do not change its tensors (`check_pruner` checks this).

    Attributes:
        grids: Token grid of each video, in prompt order. The tokens of all videos are numbered 0 to total - 1.
        budget: Maximum number of tokens to keep.
        signals: Signals by name: only those in the pruner's `needs`. Read them with `signal`.
        generator: Random generator on the CPU, seeded per request.
        device: Device of the signals.
    """

    grids: tuple[TokenGrid, ...]
    budget: int
    signals: dict[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def total(self) -> int:
        """Number of video tokens N, over all videos."""
        return sum(map(len, self.grids))

    @property
    def grid(self) -> TokenGrid:
        """Grid of the prompt's only video. Use `grids` and `by_frame` to support several videos.

        Raises:
            ValueError: The prompt has more than one video, or none.
        """
        if len(self.grids) != 1:
            raise ValueError(f"this pruner handles one video per prompt, but this prompt has {len(self.grids)}")
        return self.grids[0]

    def signal(self, name: str) -> Tensor:
        """Return a signal in the shape that `SIGNALS` lists.

        Raises:
            ValueError: The signal is not in the pruner's `needs`.
        """
        return signal_of(self.signals, name, "pruner")

    def scores(self, name: str) -> Tensor:
        """Return a signal in float32, for ranking tokens by it.

        Raises:
            ValueError: The signal contains NaN, or is not in the pruner's `needs`.
        """
        scores_N = self.signal(name).float()
        if bool(scores_N.isnan().any()):
            raise ValueError(f"cannot rank video tokens by {name}: {int(scores_N.isnan().sum())} of {scores_N.numel()} are NaN")
        return scores_N

    @property
    def verifier_attention(self) -> Tensor:
        """(N,) The signal "verifier_attention"."""
        return self.signal("verifier_attention")

    @property
    def features(self) -> Tensor:
        """(N, D) The signal "features"."""
        return self.signal("features")

    def by_frame(self, values_N: Tensor) -> list[Tensor]:
        """Reshape per-token values to frames.

        Args:
            values_N: (N, ...) One entry per video token.

        Returns:
            One (F, P, ...) tensor per video, without trailing newline tokens.
        """
        parts = values_N.split([len(grid) for grid in self.grids])
        return [part[: g.cells].unflatten(0, (g.frames, g.per_frame)) for part, g in zip(parts, self.grids, strict=True)]

    def flatten(self, values_FP: Sequence[Tensor], newline: float = float("-inf")) -> Tensor:
        """Join values per frame to one value per token: the inverse of `by_frame`.

        Args:
            values_FP: One (F, P) tensor per video.
            newline: Value of the newline tokens. The default ranks them last.

        Returns:
            (N,) One value per video token.
        """
        pairs = zip(values_FP, self.grids, strict=True)
        return torch.cat([torch.cat([x.flatten(), x.new_full((grid.newline,), newline)]) for x, grid in pairs])

    def each_video(self, select: Callable[[Self], KeepSet]) -> KeepSet:
        """Call a single-video `select` for each video and join the results.

        The budget is split in proportion to the videos' numbers of tokens. `select` is not called for a video with a
        share of 0, which is dropped, nor for one whose share covers all its cells (tokens except newline tokens), which
        keeps them all. Newline tokens are kept only if the share exceeds the number of cells.

        Args:
            select: Called with a context of one video: its grid without newline tokens, the signals of its tokens,
                and its share as budget, where 0 < budget < total.

        Returns:
            The tokens kept in all videos, with the first note that is not empty.
        """
        device = self.device
        shares = apportion(self.budget, torch.tensor([len(grid) for grid in self.grids])).tolist()
        kept, start = [], 0
        for grid, share in zip(self.grids, shares, strict=True):
            cells = grid.cells
            if 0 < share < cells:
                signals = {name: self._within(name, start, start + cells) for name in self.signals}
                alone = TokenGrid(grid.frames, grid.height, grid.width)
                keep = select(replace(self, grids=(alone,), budget=share, signals=signals))
            else:
                keep = KeepSet.everything(min(share, cells), device)
            kept.append((keep, start))
            if share > cells:
                kept.append((KeepSet.everything(share - cells, device), start + cells))
            start += len(grid)
        index_K = torch.cat([keep.index + begin for keep, begin in kept])
        note = next((keep.note for keep, _ in kept if keep.note), "")
        if all(keep.pool is None for keep, _ in kept):
            return KeepSet(index_K, self.total, note=note)
        owner, source, weight = [], [], []
        for keep, begin in kept:
            if keep.pool is None:
                rows, columns, values = keep.index, keep.index, torch.ones(len(keep), device=device)
            else:
                pool = keep.pool.coalesce()
                rows, columns, values = keep.index[pool.indices()[0]], pool.indices()[1], pool.values()
            owner.append(rows + begin)
            source.append(columns + begin)
            weight.append(values)
        return replace(KeepSet.merge(torch.cat(owner), torch.cat(source), torch.cat(weight), self.total), note=note)

    def _within(self, name: str, start: int, stop: int) -> Tensor:
        """Slice a signal to video tokens start to stop - 1. A signal without a token axis N is returned whole."""
        axes = axes_of(name)
        return self.signals[name].narrow(axes.index("N"), start, stop - start) if "N" in axes else self.signals[name]


class Pruner(Strategy, ABC):
    """Base class of pruners: select (or merge) the video tokens that the drafter sees.

    The target always sees the full video, so under a lossless verifier a pruner affects speed, never the output (if
    tokens are sampled, never its distribution). In docstrings of pruners, N is the number of video tokens, B the
    budget, F the number of frames and P the number of tokens of one frame.

    Attributes:
        keeps_all: True if nothing is ever dropped. The loop then ignores the ratio and does not call `select`.
    """

    kind = "pruner"
    keeps_all: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that `select` reads, out of `SIGNALS`. May be a class attribute."""
        return frozenset()

    @property
    def draft_layers(self) -> int:
        """Number of drafter layers to run over the unpruned video; 0 if the pruner needs no signal of the drafter."""
        return 0

    def state_layer(self, layers: int) -> int:
        """Return the target layer from which the signals in `STATE_SIGNALS` are read: its output or its keys.

        Only "final_norm" does not depend on the layer, but needs a valid one, too.

        Args:
            layers: Number of layers of the target.

        Returns:
            1 to `layers`, counted from 1. 0 if the pruner needs none of these signals.
        """
        return 0

    def attention_layers(self, layers: int) -> int:
        """Return how many of the target's layers, from the first on, have attention that `select` reads.

        This is for signals with a row per layer. With fewer than all layers, they have rows for these layers only, and
        a draft on a GPU of its own starts while the target's later layers run.

        Args:
            layers: Number of layers of the target.

        Returns:
            1 to `layers`; by default all.
        """
        return layers

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        """Weight the text tokens whose attention makes up the signal "verifier_attention_weighted".

        Called before the attention is computed, and only if `needs` contains that signal. By default, all weigh 1.

        Args:
            text_TD: (T, D) Embeddings of the text after the video, as they enter the target's first layer.
            features_ND: (N, D) Video features, as they enter the target's first layer.

        Returns:
            (T,) Weights, none negative and not all 0. They need not sum to 1.
        """
        return text_TD.new_ones(len(text_TD))

    @abstractmethod
    def select(self, ctx: PruneContext) -> KeepSet:
        """Choose the tokens to keep.

        Args:
            ctx: The videos, the budget and the signals. The loop calls `select` only if 0 < budget < total.

        Returns:
            At least one token and at most `ctx.budget`.
        """
