"""Score an answer by the share of the reference's words that it contains."""

import re
from dataclasses import dataclass

from specvlm import Answer, Metric, hookimpl


@dataclass(frozen=True)
class WordRecallMetric(Metric):
    """Share of the reference's words that the answer contains, in any order.

    shortest: letters of the shortest word that counts.
    """

    name = "word_recall"
    shortest: int = 4

    def score(self, answer: Answer) -> float | None:
        wanted = self.words(answer.reference or "")
        return len(wanted & self.words(answer.text)) / len(wanted) if wanted else None

    def words(self, text: str) -> set[str]:
        return {word for word in re.findall(r"\w+", text.lower()) if len(word) >= self.shortest}


@hookimpl
def specvlm_strategies() -> list[type]:
    return [WordRecallMetric]


if __name__ == "__main__":
    print(WordRecallMetric().score(Answer("A green ring appears.", "a green ring moves down")))
