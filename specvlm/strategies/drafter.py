"""What guesses."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from specvlm.models.kv_cache import CacheLease, CachePool, KVCache
from specvlm.models.passes import Work
from specvlm.strategies.base import Strategy
from specvlm.strategies.signals import signal_of
from specvlm.strategies.verifier import Sampling
from specvlm.types import DraftTree, KeepSet, TreeShape, Verdict, VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


@dataclass(frozen=True, eq=False)
class DraftContext:
    """What a drafter starts from. bonus: the first output token, already decided by the target's prefill.

    prompt and signals are copies. Models must be left as they are: a request behind which they differ fails.
    draft is None for a drafter whose `model` is not "draft". features_ND: the target's video features, which a
    drafter that *is* the target shares. vocabulary: ids below it are known to both models. caches: to take the session's own
    from; they are given back when the request ends. signals: those that the drafter `needs`. cache: the target's own, to be
    read and never written: all of the output so far but its last token. captured: is a `Routine` captured at its first call?
    Then one for all rounds pays, else the cheapest for each.
    """

    prompt: VideoPrompt
    keep: KeepSet
    bonus: int
    target: VideoLM
    draft: VideoLM | None
    features_ND: Tensor | None
    positions: str
    max_new_tokens: int
    vocabulary: int
    sampling: Sampling
    generator: torch.Generator
    caches: CacheLease = field(default_factory=lambda: CachePool().lease())
    signals: dict[str, Tensor] = field(default_factory=dict)
    cache: KVCache | None = None
    captured: bool = False

    def signal(self, name: str) -> Tensor:
        return signal_of(self.signals, name, "drafter")


class DraftSession(ABC):
    """The drafter's side of one request."""

    @abstractmethod
    def propose(self, last: Verdict | None) -> DraftTree | Work[DraftTree]:
        """Guesses below the last accepted token, which is node 0: `last.bonus`, and `ctx.bonus` in the first round.

        At most `max_nodes` nodes. The loop checks the tree, and writes the last accepted token to node 0 itself.

        One that needs a model is a generator. It yields a `Pass` and is sent the `Rows` that come out of it; or it yields a
        call of a `Routine`, which may be captured, and is sent its tensors. It returns the tree. Passes go to the session's
        own caches alone.

        Args:
            last: What became of the previous tree, whose nodes `last.path` were accepted; None in the first round.
        """


class Drafter(Strategy, ABC):
    """How guesses are made. `model`: whose weights draft, "draft", "target" or None."""

    kind = "drafter"
    model: ClassVar[str | None] = "draft"

    @property
    @abstractmethod
    def max_nodes(self) -> int:
        """Most nodes of a tree, root included: the target's cache keeps room for them."""

    @property
    def fixed(self) -> TreeShape | None:
        """The shape of every tree; None where they vary. Ranks without a draft need only be told the tokens of a fixed one."""
        return None

    @property
    def max_rows(self) -> int:
        """Most rows that a round writes to the drafter's cache: a tree that is cut back needs more than its nodes."""
        return self.max_nodes

    @property
    def needs(self) -> frozenset[str]:
        """Signals of the target that a session reads, of those in `SIGNALS`. A class attribute will do."""
        return frozenset()

    def own_budget(self, prompt: VideoPrompt) -> int | None:
        """How many video tokens it sees by a choice of its own, made without the pruner; None: those that the pruner leaves."""
        return None

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        if "sees" in vars(cls):
            warnings.warn(f"{cls.__name__}.sees is called own_budget now", DeprecationWarning, stacklevel=2)
            cls.own_budget = vars(cls)["sees"]  # type: ignore[method-assign]

    @abstractmethod
    def start(self, ctx: DraftContext) -> DraftSession: ...
