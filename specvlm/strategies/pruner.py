"""What chooses the video tokens that the drafter sees."""

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
    """What a pruner may look at: copies. Signals it did not ask for are absent, and asking for one is an error that says so.

    grids: one a video, in prompt order; their tokens lie one after the other in 0..total-1. budget: how many tokens
    may be kept. generator: on the CPU, seeded per request.
    """

    grids: tuple[TokenGrid, ...]
    budget: int
    signals: dict[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def total(self) -> int:
        return sum(map(len, self.grids))

    @property
    def grid(self) -> TokenGrid:
        """The grid of the only video; a pruner that handles several uses `grids` and `by_frame`."""
        if len(self.grids) != 1:
            raise ValueError(f"this pruner handles one video a prompt, this prompt has {len(self.grids)}")
        return self.grids[0]

    def signal(self, name: str) -> Tensor:
        return signal_of(self.signals, name, "pruner")

    def scores(self, name: str) -> Tensor:
        """A signal to rank tokens by, in float32. Raises ValueError where it holds NaN."""
        scores_N = self.signal(name).float()
        if bool(scores_N.isnan().any()):
            raise ValueError(f"cannot rank video tokens by {name}: {int(scores_N.isnan().sum())} of {scores_N.numel()} are NaN")
        return scores_N

    @property
    def verifier_attention(self) -> Tensor:
        return self.signal("verifier_attention")

    @property
    def features(self) -> Tensor:
        return self.signal("features")

    def by_frame(self, values_N: Tensor) -> list[Tensor]:
        """Values (N, ...) as one (F, P, ...) tensor a video; a trailing newline token is left out."""
        parts = values_N.split([len(grid) for grid in self.grids])
        return [part[: g.cells].unflatten(0, (g.frames, g.per_frame)) for part, g in zip(parts, self.grids, strict=True)]

    def flatten(self, values_FP: Sequence[Tensor], newline: float = float("-inf")) -> Tensor:
        """The inverse of `by_frame` for one value a token: (N,), newline tokens get the value `newline`."""
        pairs = zip(values_FP, self.grids, strict=True)
        return torch.cat([torch.cat([x.flatten(), x.new_full((grid.newline,), newline)]) for x, grid in pairs])

    def each_video(self, select: Callable[[Self], KeepSet]) -> KeepSet:
        """`select` for every video on its own, joined: a pruner that knows how to treat one video treats several.

        Each call gets one grid without its newline, the signals of these tokens, and a share of the budget in proportion to
        the video's tokens, 0 < budget < total; a video whose share is all of it is kept, one without a share dropped. Newline
        tokens are kept last: when the video's share holds more than its cells.
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
        """The signal of tokens start..stop-1 alone; one without a token axis whole."""
        axes = axes_of(name)
        return self.signals[name].narrow(axes.index("N"), start, stop - start) if "N" in axes else self.signals[name]


class Pruner(Strategy, ABC):
    """Picks (or merges) the video tokens the drafter sees.

    keeps_all: nothing is ever dropped; the loop then ignores the ratio and does not select.
    """

    kind = "pruner"
    keeps_all: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Signals `select` reads, of those in `SIGNALS`. A class attribute will do."""
        return frozenset()

    @property
    def draft_layers(self) -> int:
        """How many drafter layers a signal of the drafter needs; its prefill over the unpruned video stops there."""
        return 0

    def state_layer(self, layers: int) -> int:
        """Behind how many of the target's `layers` layers the signals of `STATE_SIGNALS` are read, from 1 to all of them."""
        return 0

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        """(T,) what each token of the text after the video counts for in `verifier_attention_weighted`, before it is known.

        text_TD, features_ND: as they enter the target's first layer. None negative, not all zero; the sum does not matter.
        """
        return text_TD.new_ones(len(text_TD))

    @abstractmethod
    def select(self, ctx: PruneContext) -> KeepSet:
        """At most `ctx.budget` tokens, 1 to all of them. The loop does not ask where it is all, or none."""
