"""Score the answers of a data set: with the metric that the user chose, or with the data set's own."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from specvlm.app.samples import writable_meta
from specvlm.config import RunConfig
from specvlm.errors import StrategyError, line, one_line
from specvlm.process.settings import settled
from specvlm.results.records import MOST_SCORE
from specvlm.strategies import Answer, Dataset, Metric, Sample, registry
from specvlm.strategies.fence import contained, inside


class Scorer:
    """Scores answers with one or more metrics. A metric that fails leaves its score empty; the answer stays.

    Args:
        cfg: The configuration. Uses only `cfg.metric`; if that is None, the data set's own metrics.
        dataset: The data set.
        note: Shows a message to the user.

    Raises:
        UserError: A metric of the data set is unknown, or lacks a library that it needs.
    """

    def __init__(self, cfg: RunConfig, dataset: Dataset, note: Callable[[str], None] = lambda line: None) -> None:
        with inside(dataset):
            self.dataset, chosen = dataset.name, [cfg.metric] if cfg.metric is not None else list(dataset.metrics)
        self.metrics: list[Metric] = [registry.build("metric", one) for one in chosen]
        self.note = note
        self.sources = {metric.name: source_of(metric, self.dataset) for metric in self.metrics}

    def row(self, sample: Sample, figures: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Score an answer and the target's own.

        Args:
            sample: The sample.
            figures: The metrics of the answer, see `metrics.KEYS`.
            tokenizer: Decodes the target's own answer.

        Returns:
            `scores` and `baseline_scores`, the latter None without a baseline. Empty if there is no metric, or if
            memory ran out, so that the answer is not complete.
        """
        if not self.metrics or figures["out_of_memory"]:
            return {}
        scores, alone = self._scores(sample, figures["text"]), figures["baseline_token_ids"]
        if alone is None:
            return {"scores": scores, "baseline_scores": None}
        text = tokenizer.decode(alone, skip_special_tokens=True)
        return {"scores": scores, "baseline_scores": scores if text == figures["text"] else self._scores(sample, text)}

    def _scores(self, sample: Sample, text: str) -> dict[str, float | None]:
        """Score one text by every metric."""
        options, meta = tuple(sample.options), writable_meta(sample)
        answer = Answer(text, sample.answer, options, self.dataset, sample.id, sample.question, dict(meta))
        return {metric.name: self._score(metric, answer) for metric in self.metrics}

    def _score(self, metric: Metric, answer: Answer) -> float | None:
        """Call a metric. Returns None, with a note, if it fails or its score is not a finite number."""
        try:
            with settled(), contained(), inside(metric):
                return finite(metric.score(answer), metric)
        except Exception as error:
            self.note(f"metric={metric.name} leaves answers without a score: {one_line(error)}")
            return None


def finite(score: Any, metric: Metric) -> float | None:
    """Return a score as a float; None stays None. Raises StrategyError if it is not a number that a row may hold."""
    if score is None:
        return None
    number: Any = score if isinstance(score, Real) else math.nan
    if abs(number) <= MOST_SCORE:  # false for NaN
        return float(number)
    wanted = f"a finite number of at most {MOST_SCORE:g} or None"
    raise StrategyError(f"metric={metric.name} gave the score {line(repr(score))}: expected {wanted}")


def source_of(metric: Metric, dataset: str) -> str:
    """Describe a metric for results: its fields and the source of its rule."""
    with inside(metric):
        source = str(metric.source(dataset))
    return ", ".join(filter(None, (registry.described(metric), line(source))))
