"""Share of answers that equal the reference."""

import re
import unicodedata
from dataclasses import dataclass

from specvlm.strategies.metric import Answer, Metric


@dataclass(frozen=True)
class ExactMatchMetric(Metric):
    """Share of answers that equal the reference, apart from white space and how Unicode composes letters.

    Attributes:
        ignore_case: Whether "Red" equals "red".
        ignore_punctuation: Whether "two." equals "two": drops all but letters, digits, _ and white space.
    """

    name = "exact_match"
    ignore_case: bool = True
    ignore_punctuation: bool = False

    def score(self, answer: Answer) -> float | None:
        return None if answer.reference is None else float(self._plain(answer.text) == self._plain(answer.reference))

    def _plain(self, text: str) -> str:
        """Return a text without the differences to ignore."""
        text = unicodedata.normalize("NFC", text)
        if self.ignore_punctuation:
            text = re.sub(r"[^\w\s]", "", text)
        return " ".join((text.casefold() if self.ignore_case else text).split())
