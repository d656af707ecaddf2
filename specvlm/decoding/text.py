"""Turn the tokens of an answer into text as they arrive, and find the texts that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # previous tokens that the text of a token may depend on
BROKEN = "\ufffd"  # decoders put it in place of a character whose last bytes have not arrived yet


class AnswerText:
    """The text of a growing answer, in whole characters.

    The pieces that `put` and `end` return add up to the text of all tokens, without special tokens and up to the first
    stop text. A piece is held back while it may be part of a character or the beginning of a stop text.

    Args:
        tokenizer: The model's tokenizer.
        stop: Texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # whether a stop text was found
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Tokens since the last but one piece, and how many of them are in text already. A decoder may treat the first
        # token otherwise, so the tokens of the last piece stay in front of new ones.
        self._tokens: list[int] = []
        self._known = 0
        self._held = ""  # text that may begin a stop text

    def put(self, token: int) -> str:
        """Add a token. Returns the text that has become certain, which may be empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._decoded()
        return "" if not new or new.endswith(BROKEN) else self._passed(new)

    def end(self) -> str:
        """End the answer. Returns the text held back, with a replacement character for an incomplete character."""
        if self.stopped:
            return ""
        found = self._passed(self._decoded())
        if self.stopped:
            return found
        rest, self._held, self._tokens, self._known = self._held, "", [], 0
        return found + rest

    def _decoded(self) -> str:
        """Return the text of the tokens that have not been turned into text yet."""
        known, whole = (
            self._tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (self._tokens[: self._known], self._tokens)
        )
        return str(whole[len(known) :])

    def _passed(self, new: str) -> str:
        """Add decoded text. Returns the certain part, up to a stop text or to a possible beginning of one."""
        self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        text = self._held + new
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def spell(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], skip: bool = True) -> list[str]:
    """Decode tokens one by one. The text of a character of several tokens goes to the last of them.

    Args:
        tokenizer: The model's tokenizer.
        before: Tokens that precede `tokens`.
        tokens: Tokens to decode.
        skip: Whether to omit special tokens.

    Returns:
        The text of each of `tokens`.
    """
    line, texts = list(before[-CONTEXT:]), []
    for token in tokens:
        known = tokenizer.decode(line, skip_special_tokens=skip).rstrip("\ufffd")
        line.append(token)
        text = tokenizer.decode(line, skip_special_tokens=skip)
        texts.append("" if text.endswith("\ufffd") else text[len(known) :])
    return texts
