"""Base class of metrics, and the answers that they score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from specvlm.strategies.base import Strategy


@dataclass(frozen=True)
class Answer:
    """One answer, with what the data set says about its sample.

    Attributes:
        text: The answer, without special tokens.
        reference: The right answer; None if unknown.
        options: The possible answers, written like `reference`; empty unless it is multiple choice.
        dataset: Registered name of the data set.
        sample: Id of the sample.
        question: The question as put to the model.
        meta: `Sample.meta`.
    """

    text: str
    reference: str | None = None
    options: tuple[str, ...] = ()
    dataset: str = ""
    sample: str = ""
    question: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def letters(self) -> str:
        """Letters of the options in their order, such as "ABCD"."""
        return ascii_uppercase[: len(self.options)]

    @property
    def letter(self) -> str | None:
        """Letter of the right option; None if it is unknown. Of equal options, the first counts."""
        pairs = zip(self.options, self.letters, strict=False)
        return next((letter for option, letter in pairs if option == self.reference), None)


class Metric(Strategy, ABC):
    """Base class of metrics: a score for each answer, the higher the better, usually from 0 to 1.

    A job's score is the mean over its samples.
    """

    kind = "metric"

    @abstractmethod
    def score(self, answer: Answer) -> float | None:
        """Score an answer. The same answer must always get the same score.

        Args:
            answer: The answer, of any length and content.

        Returns:
            A finite number, or None to leave the sample out: its right answer is unknown, or the rule does not count
            such an answer.
        """

    def source(self, dataset: str) -> str:
        """Return the source of a data set's rule: a script and its version. Recorded with results; may be empty."""
        return ""
