"""The words of a round: accepted guesses, refused ones, and the target's own."""

from __future__ import annotations

from typing import Any

from specvlm.decoding.text import spell
from specvlm.types import Step


class Marks:
    """Spells the rounds of an answer, in order."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._before, self._round = tokenizer, list[int](), 0

    def of(self, step: Step) -> dict[str, object]:
        """Return the number of the next round, and its words as `accepted`, `refused` and `own`."""
        guesses, own = list(step.tokens[: step.accepted]), step.tokens[step.accepted :]
        before, after = self._before, self._before + guesses
        found: dict[str, object] = {
            "round": self._round,
            "accepted": spell(self._tokenizer, before, guesses),
            "refused": spell(self._tokenizer, after, step.refused, skip=False),  # also shows a guessed end
            "own": spell(self._tokenizer, after, own)[0] if own else None,
        }
        self._before, self._round = [*before, *step.tokens], self._round + 1
        return found
