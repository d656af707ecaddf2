"""Options of one request, such as its token limit and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

from torch import Tensor

from specvlm.errors import UserError

MOST_LOGPROBS = 100
LogitsRule: TypeAlias = Callable[[Sequence[int], Tensor], Tensor]


@dataclass(frozen=True)
class GenerationOptions:
    """Everything that one request sets besides its prompt.

    Attributes:
        max_new_tokens: Maximum number of tokens to generate; a stop id ends the answer earlier.
        ratio: Share of the video tokens hidden from the drafter, 0..1. At 1 the drafter sees no video.
        positions: Rotary positions of the drafter's prompt tokens: `original` (those in the full prompt) or `reindexed`
            (contiguous, as in the paper's code).
        seed: Seed of every random draw for this request.
        repetition_penalty: Factor that makes repeated tokens less likely. None uses the value of the target's
            checkpoint; 1 turns it off.
        stop_ids: Token ids that end the answer. None uses those of the target's checkpoint.
        record: Also return the target's attention to the video (`Step.attention`).
        stop: Texts that end the answer, after the token that completes one. Special tokens do not count as text.
        adjust: Changes the target's logits, after the repetition penalty: maps the token ids of the answer so far and
            the (V,) logits of the next token to (V,) logits. It must depend on nothing else. None changes nothing.
        logprobs: Also return the target's log-probabilities: those of each token of the answer, and of this many of
            the most likely tokens in its place (`Step.logprobs`). None returns none.

    Raises:
        UserError: A value is out of range.
    """

    max_new_tokens: int = 256
    ratio: float = 0.9
    positions: str = "original"
    seed: int = 0
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] | None = None
    record: bool = False
    stop: tuple[str, ...] = ()
    adjust: LogitsRule | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.ratio <= 1:
            raise UserError(f"ratio={self.ratio} is not between 0 and 1: it is the share of video tokens dropped")
        if self.positions not in ("original", "reindexed"):
            raise UserError(f"positions={self.positions!r} is none of original, reindexed")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < inf:
            raise UserError(f"repetition_penalty must be finite and more than 0, got {self.repetition_penalty}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop={self.stop!r}: expected texts, none of them empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs={self.logprobs}: expected a number of tokens from 0 to {MOST_LOGPROBS}")

    def asked(self, options: GenerationOptions | int | None) -> GenerationOptions:
        """Resolve a caller's argument: None gives `self`, an int gives `self` with that `max_new_tokens`.

        Options are returned unchanged. They replace `self` entirely.
        """
        if options is None:
            return self
        return replace(self, max_new_tokens=options) if isinstance(options, int) else options

    def stop_ids_or(self, own: frozenset[int]) -> frozenset[int]:
        """Return the token ids that end the answer: the request's, or the target's `own` if it sets none."""
        return own if self.stop_ids is None else self.stop_ids
