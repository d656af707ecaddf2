"""ROUGE-L, by Google's package rouge-score."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from specvlm.errors import UserError
from specvlm.strategies.metric import Answer, Metric


@dataclass(frozen=True)
class RougeLMetric(Metric):
    """F-measure of the longest common subsequence with the reference: ROUGE-L, for captions.

    Computed by rouge-score (`pip install 'specvlm[metrics]'`): its `rougeL` over whole answers, with words of ASCII
    letters and digits only.

    Attributes:
        stem: Whether words are compared by their stems (Porter), as in "run" and "running".
    """

    name = "rouge_l"
    paper = "Lin, ROUGE (ACL workshop 2004)"
    fidelity = "exact"
    stem: bool = False

    def score(self, answer: Answer) -> float | None:
        if answer.reference is None:
            return None
        return float(_scorer(self.stem).score(answer.reference, answer.text)["rougeL"].fmeasure)

    def source(self, dataset: str) -> str:
        if find_spec("rouge_score") is None:
            raise UserError("metric=rouge_l needs rouge-score: pip install 'specvlm[metrics]'")
        return f"rouge-score {version('rouge-score')}"


@cache
def _scorer(stem: bool) -> Any:
    """Make the package's scorer. Imported on first use, since it imports NLTK."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem)
