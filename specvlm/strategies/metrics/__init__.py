"""Built-in metrics, one per file. `published.py` has the rules of the data sets' own scripts."""

from specvlm.strategies.metrics.accuracy import AccuracyMetric
from specvlm.strategies.metrics.exact_match import ExactMatchMetric
from specvlm.strategies.metrics.rouge_l import RougeLMetric
from specvlm.strategies.plugins import hookimpl


@hookimpl
def specvlm_strategies() -> list[type]:
    return [AccuracyMetric, ExactMatchMetric, RougeLMetric]
