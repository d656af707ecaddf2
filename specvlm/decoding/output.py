"""Decide where an answer ends."""

from collections.abc import Sequence

from specvlm.decoding.text import AnswerText
from specvlm.models.video_lm import VideoLM
from specvlm.types import GenerationOptions


class Output:
    """Collects an answer's tokens, and ends the answer at the token limit, or after a stop id or stop text.

    The token that ends the answer belongs to it.

    Args:
        limit: Maximum number of tokens.
        stop_ids: Token ids that end the answer.
        text: Finds stop texts; None if the request has none.
    """

    def __init__(self, limit: int, stop_ids: frozenset[int], text: AnswerText | None = None) -> None:
        # room: number of tokens that may still be added; 0 once the answer has ended.
        self.room, self.stop_ids, self._text = limit, stop_ids, text
        self.tokens: list[int] = []  # the answer so far

    @classmethod
    def of(cls, target: VideoLM, options: GenerationOptions) -> "Output":
        """Make the output of a request."""
        text = AnswerText(target.tokenizer, options.stop) if options.stop else None
        return cls(options.max_new_tokens, options.stop_ids_or(target.stop_ids), text)

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self.room == 0

    def take(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Add a round's tokens to the answer, up to its end. Returns the tokens that were added."""
        tokens = tokens[: self.room]
        stop = next((number for number, token in enumerate(tokens, start=1) if self._ends(token)), None)
        self.room = 0 if stop else self.room - len(tokens)
        self.tokens += tokens[:stop]
        return tuple(tokens[:stop])

    def _ends(self, token: int) -> bool:
        """Whether the answer ends with its next token. Each token must be passed once, in order."""
        if token in self.stop_ids:
            return True
        if self._text is None:
            return False
        self._text.put(token)
        return self._text.stopped
