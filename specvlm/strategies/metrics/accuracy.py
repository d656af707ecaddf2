"""Accuracy in multiple choice, by the rule that each data set publishes."""

from dataclasses import dataclass

from specvlm.errors import check_choice
from specvlm.strategies.metric import Answer, Metric
from specvlm.strategies.metrics.published import LMMS_EVAL, PUBLISHED, SOURCES, Rule, choice

RULES = ("published", "lmms_eval", "choice")


@dataclass(frozen=True)
class AccuracyMetric(Metric):
    """Share of questions for which the right option is chosen, by the data set's own published rule.

    How an answer such as "(B)", "B. A dog" or "The answer is B" is read differs between the scripts of MVBench, MLVU,
    Video-MME and LongVideoBench, so each has a rule of its own, quirks included; see `published.py`. Any other data
    set with options is scored by `choice`. Samples without options, or without a known right one, are left out.

    Attributes:
        rule: `published`: the data set's own script; for LongVideoBench, which has none, lmms-eval's task. `lmms_eval`:
            the task of lmms-eval. `choice`: our own rule, which is the same for every data set.
    """

    name = "accuracy"
    rule: str = "published"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)

    def score(self, answer: Answer) -> float | None:
        return None if answer.letter is None else self._rule(answer.dataset)(answer)

    def source(self, dataset: str) -> str:
        return SOURCES[self._rule(dataset)]

    def _rule(self, dataset: str) -> Rule:
        """Find the rule for a data set."""
        table = {"published": PUBLISHED, "lmms_eval": LMMS_EVAL}.get(self.rule, {})
        return table.get(dataset, choice)
