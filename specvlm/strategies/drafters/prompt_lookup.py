"""Guess the tokens that followed the last words when they occurred before. Needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.types import MOST_GUESSES, DraftTree, Verdict, Within

_GAP = -1  # replaces a run of placeholders in the history; not a token id


@dataclass(frozen=True)
class PromptLookupDrafter(Drafter):
    """Find the last words earlier in the prompt or the answer, and propose the chain of tokens that followed there.

    The last words are the longest n-gram at the end of the text, of max_ngram down to min_ngram tokens, that occurs
    earlier. Its latest occurrence is used: it is closest in topic, lies in the answer once the answer repeats itself,
    and needs a table of only one entry per n-gram. A chain that reaches the end of the text continues with its own
    beginning, so that a loop of any period is proposed in full. Without a match the tree is only the root, and the
    round is an autoregressive step.

    With x the text of n tokens and s the size of the n-gram, j is the largest index below n with
    x[j - s : j] = x[n - s :], and the guesses are x[j], x[j + 1], ...

    Prompt look-up decoding: Saxena (2023), github.com/apoorvumang/prompt-lookup-decoding; LLMA (arXiv 2304.04487)
    copies from reference texts in the same way.
    Deviations: the latest occurrence instead of the first, and chains that go on past the end of the text (both find
    more in answers that repeat themselves); 5 guesses, as deep as the paper's tree, instead of 10; placeholders of
    videos and images are never proposed, n-grams do not span them, and chains end before them.

    Cost: no forward pass; one table entry per token and size of n-gram, none for placeholders. Limits: it pays only if
    the answer repeats itself or the prompt, which captions rarely do. The size of the tree differs from round to round.

    Attributes:
        max_ngram: Number of tokens of the longest n-gram that is looked up.
        min_ngram: Number of tokens of the shortest n-gram that is looked up.
        length: Maximum number of guesses per round.

    Raises:
        ValueError: Unless 1 <= min_ngram <= max_ngram and length >= 1.
    """

    name = "prompt_lookup"
    paper = "prompt look-up decoding (Saxena, 2023; LLMA, arXiv 2304.04487)"
    fidelity = "adapted"
    model = None

    max_ngram: Annotated[int, Within(1, 64)] = 3
    min_ngram: Annotated[int, Within(1, 64)] = 1
    length: Annotated[int, Within(1, MOST_GUESSES)] = 5

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"n-grams need 1 <= min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")
        if self.length < 1:
            raise ValueError(f"length must be at least 1 token, got {self.length}")

    @property
    def max_nodes(self) -> int:
        return 1 + self.length

    def start(self, ctx: DraftContext) -> PromptLookupSession:
        return PromptLookupSession(self, ctx)


class PromptLookupSession(DraftSession):
    """Keeps the text so far, and the position after the last occurrence of each n-gram. Never rescans the text."""

    def __init__(self, drafter: PromptLookupDrafter, ctx: DraftContext) -> None:
        self._length = drafter.length
        self._sizes = range(drafter.max_ngram, drafter.min_ngram - 1, -1)
        self._bonus = ctx.bonus
        self._placeholders = (ctx.target.video_token, ctx.target.image_token)
        gap_S = torch.isin(ctx.prompt.tokens, torch.tensor(self._placeholders))
        repeated_S = gap_S & gap_S.roll(1)  # thousands of placeholders become one gap
        self._history: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where its last continuation starts
        for token in ctx.prompt.tokens[~repeated_S].tolist():
            self._append(token)
        self._chain: list[int] = []

    def propose(self, last: Verdict | None) -> DraftTree:
        """Add the accepted tokens to the history, and propose the chain that continues it."""
        if last is None:
            last = Verdict((0,), self._bonus)
        for node in last.path[1:]:
            self._append(self._chain[node])
        self._append(last.bonus)
        self._chain = [last.bonus, *self._continuation()]
        return DraftTree(torch.tensor(self._chain), tuple(range(-1, len(self._chain) - 1)))

    def _append(self, token: int) -> None:
        """Add a token to the history, and record it as the continuation of the n-grams before it."""
        # Enter n-grams only once the token after them is known, so that the end of the text does not match itself.
        if token in self._placeholders:
            token = _GAP
        if token != _GAP:
            for gram in self._endings():
                self._next[gram] = len(self._history)
        self._history.append(token)

    def _endings(self) -> list[tuple[int, ...]]:
        """List the n-grams at the end of the history, longest first, without those that span a gap."""
        grams = [tuple(self._history[-size:]) for size in self._sizes if size <= len(self._history)]
        return [gram for gram in grams if _GAP not in gram]

    def _continuation(self) -> list[int]:
        """Return the tokens that last followed the longest known n-gram at the end; empty if none is known."""
        found = next((self._next[gram] for gram in self._endings() if gram in self._next), None)
        chain: list[int] = []
        if found is None:
            return chain
        end = len(self._history)
        for at in range(found, found + self._length):
            token = self._history[at] if at < end else chain[at - end]
            if token == _GAP:
                break
            chain.append(token)
        return chain
