"""Every built-in metric keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from specvlm.strategies import Answer, metrics
from specvlm.strategies.metrics.accuracy import RULES, AccuracyMetric
from specvlm.strategies.metrics.exact_match import ExactMatchMetric
from specvlm.strategies.metrics.rouge_l import RougeLMetric
from specvlm.testing import check_metric

INSTANCES = [
    *(AccuracyMetric(rule) for rule in RULES),
    ExactMatchMetric(),
    ExactMatchMetric(ignore_case=False, ignore_punctuation=True),
    RougeLMetric(),
    RougeLMetric(stem=True),
]


@pytest.mark.parametrize("metric", INSTANCES, ids=repr)
def test_built_in_keeps_the_contract(metric):
    if isinstance(metric, RougeLMetric):
        pytest.importorskip("rouge_score")
    check_metric(metric)


def test_every_built_in_is_checked():
    assert {type(metric) for metric in INSTANCES} == set(metrics.specvlm_strategies())


SEEN: list[Answer] = []


@dataclass(frozen=True)
class Faulty(ExactMatchMetric):
    name = "faulty"
    fault: str = ""

    def score(self, answer):
        SEEN.append(answer)
        found = {
            "raises": lambda: 1 / len(answer.text),
            "a text": lambda: "0.5",
            "not finite": lambda: float("nan"),
            "remembers": lambda: float(len(SEEN)),
            "draws": lambda: float(torch.rand(())),
            "guesses": lambda: float(answer.text == (answer.reference or "B")),
            "changes": lambda: answer.meta.clear() or 1.0,
        }
        return found[self.fault]() if self.fault in found else super().score(answer)

    def source(self, dataset):
        return "two\nlines" if self.fault == "source" else ""


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "fails on '' .* with ZeroDivisionError"),
        ("a text", "expected a finite number or None"),
        ("not finite", "expected a finite number or None"),
        ("remembers", "and later with"),
        ("draws", "and later with|global generator"),
        ("guesses", "its right answer is unknown"),
        ("changes", "changes the answer"),
        ("source", "source must be one line"),
    ],
)
def test_the_suite_catches(fault, says):
    with pytest.raises(AssertionError, match=says):
        check_metric(Faulty(fault=fault))


def test_a_metric_without_a_fault_passes():
    check_metric(Faulty())
