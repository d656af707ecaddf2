"""Base classes and context of drafters, which guess the tokens that the target verifies.

Shape suffixes: N video tokens, D width of the target.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from specvlm.models.kv_cache import CacheLease, CachePool, KVCache
from specvlm.models.passes import Work
from specvlm.strategies.base import Strategy
from specvlm.strategies.signals import signal_of
from specvlm.strategies.verifier import Sampling
from specvlm.types import DraftTree, Features, KeepSet, TreeShape, Verdict, VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


class DraftPrefill:
    """Prefills the drafting model. The decoding loop passes a subclass that reuses cache rows of earlier requests."""

    def features(self, model: VideoLM, prompt: VideoPrompt, keep: KeepSet) -> Tensor | Features:
        """Compute the video features of a model, as `VideoLM.features` does."""
        return model.features(prompt, keep)

    def fill(
        self, model: VideoLM, inputs: tuple[Tensor | Features, Tensor], cache: KVCache, prompt: VideoPrompt, keep: KeepSet
    ) -> None:
        """Fill an empty cache with the pruned prompt. inputs: from `VideoLM.pruned`, of all features and `keep`."""
        model.prefill(*inputs, cache)

    def start(self, ctx: DraftContext, model: VideoLM, rows: int) -> KVCache:
        """Take a session's cache, named "draft", and fill it with the pruned prompt.

        Args:
            ctx: Context of the session.
            model: The model that drafts.
            rows: Slots to reserve beyond those of prompt and answer.

        Returns:
            The cache.
        """
        features = ctx.features_ND if model is ctx.target else None
        if features is None:
            features = self.features(model, ctx.prompt, ctx.keep)
        inputs = model.pruned(ctx.prompt, features, ctx.keep, ctx.positions)
        cache = ctx.caches.take("draft", model, len(inputs[0]) + ctx.max_new_tokens + rows)
        self.fill(model, inputs, cache, ctx.prompt, ctx.keep)
        return cache


@dataclass(frozen=True, eq=False)
class DraftContext:
    """Input of a draft session: one request after the target's prefill.

    Do not modify the models: a request that leaves them changed fails.

    Attributes:
        prompt: A copy of the request's prompt.
        keep: The video tokens that the pruner kept.
        bonus: The first output token, taken from the target's prefill. Root of the first draft tree.
        target: The target model.
        draft: The draft model; may be None unless the drafter's `model` is "draft".
        features_ND: (N, D) The target's video features, for drafters that run the target.
        positions: Rotary positions of the drafter: "original" (of the full prompt) or "reindexed" (contiguous).
        max_new_tokens: Maximum number of tokens of the answer.
        vocabulary: Ids below this number are known to both models.
        sampling: How the target's next token is drawn. Drafters that sample warp their distribution the same way.
        generator: Random generator on the CPU, seeded per request.
        caches: Source of the session's KV caches. They are returned when the request ends.
        signals: Copies of the signals in the drafter's `needs`, by name. Read them with `signal`.
        cache: The target's KV cache, read-only. Holds the prompt and the output except its last token.
        captured: True if the engine captures each `Routine` at its first call. Then use one routine for all rounds;
            otherwise use the cheapest one for each round.
        seed: Seed of the noise that a coupled verifier shares with the drafter (see `gumbel`). None unless `sampling`
            is coupled.
        next_shape: Returns the shape to draft next, chosen by measured costs, this request's acceptance and the number
            of requests that run; a root alone where plain decoding is faster. For drafters whose shape may vary: call
            it once in each `propose`. None: choose a fixed shape.
        prefill: Prefills the session's model. A session that uses it starts faster if the video occurred before.
    """

    prompt: VideoPrompt
    keep: KeepSet
    bonus: int
    target: VideoLM
    draft: VideoLM | None
    features_ND: Tensor | Features | None
    positions: str
    max_new_tokens: int
    vocabulary: int
    sampling: Sampling
    generator: torch.Generator
    caches: CacheLease = field(default_factory=lambda: CachePool().lease())
    signals: dict[str, Tensor] = field(default_factory=dict)
    cache: KVCache | None = None
    captured: bool = False
    seed: int | None = None
    next_shape: Callable[[], TreeShape] | None = None
    prefill: DraftPrefill = field(default_factory=DraftPrefill)

    def signal(self, name: str) -> Tensor:
        """Return a signal in the shape that `SIGNALS` lists.

        Raises:
            ValueError: The signal is not in the drafter's `needs`, or the prompt has no video to collect it from.
        """
        return signal_of(self.signals, name, "drafter")


class DraftSession(ABC):
    """Drafter state of one request, created by `Drafter.start`.

    Attributes:
        drafted_ahead: Number of levels of the last tree that `guess_on` had drafted. None if `guess_on` did not run
            before that tree.
    """

    drafted_ahead: int | None = None

    @abstractmethod
    def propose(self, last: Verdict | None) -> DraftTree | Work[DraftTree]:
        """Propose a tree of guesses that continue the output.

        Node 0 is the last accepted token: `last.bonus`, or `ctx.bonus` in the first round. For plugins the loop fills
        it in. The loop checks every tree.

        A session that runs a model writes `propose` as a generator that returns the tree. It yields either a `Pass`,
        and receives its `Rows`, or a call of a `Routine`, which may be captured, and receives its tensors. Passes may
        write only to caches taken from `ctx.caches`.

        Args:
            last: Verdict on the previous tree; None in the first round.

        Returns:
            A tree of at most `max_nodes` nodes, or a generator that returns one.
        """

    def guess_on(self, done: Callable[[], bool]) -> Work[None] | None:
        """Draft below likely outcomes of the last tree's check, while the target runs it.

        The next `propose` learns which outcome came true. Its tree must not depend on how far this method got: under
        sampling, guesses that depend on the device's speed would bias the output.

        Args:
            done: Returns, without waiting, whether the verdict is ready or the check does not run at the same time.
                Once it is true, return, since the request waits for nothing else.

        Returns:
            A generator of passes and calls, as for `propose`, or None to draft nothing. It must not read on the host
            what depends on the check.
        """
        return None


class Drafter(Strategy, ABC):
    """Base class of drafters: guess the next tokens as a tree that the target verifies in one pass.

    Attributes:
        model: Whose weights the drafter runs: "draft", "target", or None without a model.
        prefills: Whether sessions get their cache from `DraftContext.prefill.start`, with at most `max_rows` + 2 rows.
            On a GPU of its own the draft then starts while the target's prefill runs.
    """

    kind = "drafter"
    model: ClassVar[str | None] = "draft"
    prefills: ClassVar[bool] = False

    @property
    @abstractmethod
    def max_nodes(self) -> int:
        """Maximum number of nodes of a tree, root included. The target's cache reserves slots for them."""

    @property
    def fixed(self) -> TreeShape | None:
        """Shape of every tree, or None if the shape varies.

        With tensor parallelism and a fixed shape, processes without a draft model are sent only each tree's tokens, and
        its `q` if guesses are drawn.
        """
        return None

    @property
    def adapts(self) -> bool:
        """Whether sessions draft the shapes that `DraftContext.next_shape` chooses, of at most `max_nodes` nodes."""
        return False

    @property
    def max_rows(self) -> int:
        """Maximum number of rows that a round writes to the drafter's cache.

        Exceeds `max_nodes` for a tree that is grown beyond that size and then cut back.
        """
        return self.max_nodes

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that a session reads, out of `SIGNALS`. May be a class attribute."""
        return frozenset()

    def own_budget(self, prompt: VideoPrompt) -> int | None:
        """Return the number of video tokens for a drafter that chooses them itself.

        Args:
            prompt: A copy of the prompt without pixels.

        Returns:
            The number of tokens, in which case the pruner is not called; None if the pruner chooses them.
        """
        return None

    def __init_subclass__(cls, **more: object) -> None:
        """Accept `sees`, the former name of `own_budget`, with a warning."""
        super().__init_subclass__(**more)
        if "sees" in vars(cls):
            warnings.warn(f"{cls.__name__}.sees is called own_budget now", DeprecationWarning, stacklevel=2)
            cls.own_budget = vars(cls)["sees"]  # type: ignore[method-assign]

    @abstractmethod
    def start(self, ctx: DraftContext) -> DraftSession:
        """Create the session of a request. Called once, after the target's prefill and the pruner.

        Args:
            ctx: The request, the models and the caches.

        Returns:
            The session, which the loop asks for a tree in every round.
        """
