"""Guess that what followed these words before will follow them again; no model at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from specvlm.strategies import DraftContext, Drafter, DraftSession
from specvlm.types import MOST_GUESSES, DraftTree, Verdict, Within

_GAP = -1  # stands in the history for a run of placeholders, and is no token


@dataclass(frozen=True)
class PromptLookupDrafter(Drafter):
    """Find the last words earlier in the prompt or the answer, and propose the chain of tokens that followed there.

    Of the n-grams that end the text so far, the longest with an earlier occurrence counts (max_ngram down to min_ngram
    tokens). Of its occurrences the latest: it is nearest in topic, it lies in the answer rather than in the instructions
    once the answer repeats itself, and a table with one entry an n-gram finds it. A chain that runs into the end of the
    text goes on with its own beginning, so a loop of any period is proposed in full. Without a match the tree is the
    root alone, and the round is an autoregressive step.

    With x the text of n tokens and s the size of the n-gram, j is the largest index below n with x[j - s : j] = x[n - s :], and
    the guesses are x[j], x[j + 1], ...

    Prompt look-up decoding: Saxena (2023), github.com/apoorvumang/prompt-lookup-decoding; LLMA (arXiv 2304.04487) copies from
    reference texts in the same way. Deviations: the latest occurrence in the place of the first, and chains that go on past
    the end of the text (both find more in answers that repeat themselves); 5 guesses, as deep as the paper's tree, for 10;
    placeholders of videos and images are never proposed, n-grams do not span them and chains end before them.

    Cost: no forward pass; max_ngram table entries a token, a run of placeholders counting as one token without any.
    Limits: pays where the answer repeats itself or words of the prompt, which a caption seldom does; trees differ in
    size from round to round. ValueError unless 1 <= min_ngram <= max_ngram and length >= 1.
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
    """The text so far and where each of its n-grams last ended. Grows by the accepted tokens of a round, never rescans."""

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
        if last is None:
            last = Verdict((0,), self._bonus)
        for node in last.path[1:]:
            self._append(self._chain[node])
        self._append(last.bonus)
        self._chain = [last.bonus, *self._continuation()]
        return DraftTree(torch.tensor(self._chain), tuple(range(-1, len(self._chain) - 1)))

    def _append(self, token: int) -> None:
        # An n-gram is entered when the token after it is known, so the end of the text never matches itself.
        if token in self._placeholders:
            token = _GAP
        if token != _GAP:
            for gram in self._endings():
                self._next[gram] = len(self._history)
        self._history.append(token)

    def _endings(self) -> list[tuple[int, ...]]:
        """The n-grams that end the history, longest first; none across a gap."""
        grams = [tuple(self._history[-size:]) for size in self._sizes if size <= len(self._history)]
        return [gram for gram in grams if _GAP not in gram]

    def _continuation(self) -> list[int]:
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
