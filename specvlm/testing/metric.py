"""Contract checks for metrics, on answers of many kinds. Needs no model."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import Any

from specvlm.errors import UserError
from specvlm.strategies import Answer, Metric
from specvlm.testing.contract import made, other_global_state

OPTIONS = ("Red", "Dark blue", "Green", "Yellow")
TEXTS = (
    "B", "(B)", "B. Dark blue", "b", "The answer is B.", "Dark blue", "dark blue and green", "B or C", "E", "",
    " ", "\n\n", "I am sorry, I cannot answer this.", "None of the above", "…", "青い", "\N{GRINNING FACE}", "\x00", "\ud800",
    "1", "nan", "{}", "a" * 100_000, "red " * 10_000,
)  # fmt: skip


def check_metric(metric: type[Metric] | Metric, **fields: Any) -> None:
    """Check that a metric keeps the contract of `Metric.score`.

    Cases: letters, sentences, refusals, empty and very long answers, and texts that are not valid Unicode; to questions
    with and without options, with and without a known answer.

    Checks: a score is a finite number or None; it is the same for the same answer, regardless of earlier answers and of
    torch's global generator, which is left alone; the answer is not changed; an answer without a reference either gets
    None or the same score as with one; `source` is one line.

    Args:
        metric: A class or an instance. The class must work without arguments.
        **fields: Values of the metric's fields.

    Raises:
        AssertionError: The metric breaks the contract.
        UserError: The metric raised it, for example since a library that it needs is missing.
    """
    metric = made(metric, Metric, fields)  # type: ignore[type-abstract]
    cases = list(_answers())
    first = [_score(metric, answer) for answer in cases]
    with other_global_state(repr(metric)):
        again = [_score(metric, answer) for answer in reversed(cases)][::-1]
    for answer, one, other in zip(cases, first, again, strict=True):
        assert one == other, f"{metric!r} scores {_shown(answer)} with {one}, and later with {other}"
        if answer.reference is None:
            fits = one in (None, _score(metric, replace(answer, reference="Dark blue")))
            assert fits, f"{metric!r} scores {_shown(answer)} with {one}, though its right answer is unknown: return None"
    source = metric.source("folder")
    assert isinstance(source, str) and "\n" not in source, f"{metric!r}: source must be one line, got {source!r}"


def _answers() -> Iterator[Answer]:
    """Yield every case."""
    for text in TEXTS:
        for options, reference in ((OPTIONS, "Dark blue"), (OPTIONS, None), ((), "dark blue"), ((), None), ((), "")):
            yield Answer(text, reference, options, "folder", "one", "Which colour?", {"task": "colour"})


def _score(metric: Metric, answer: Answer) -> float | None:
    """Score an answer. Raises AssertionError if that fails, does not give a finite number, or changes the answer."""
    before = copy.deepcopy(answer)
    try:
        found = metric.score(answer)
    except UserError:
        raise  # a library that it needs is missing
    except Exception as error:
        raise AssertionError(f"{metric!r} fails on {_shown(answer)} with {type(error).__name__}: {error}") from error
    number = found is None or (isinstance(found, Real) and math.isfinite(found))
    assert number, f"{metric!r} scores {_shown(answer)} with {found!r}: expected a finite number or None"
    assert answer == before, f"{metric!r} changes the answer {_shown(before)}"
    return found


def _shown(answer: Answer) -> str:
    """Describe an answer for a message."""
    return f"{answer.text[:40]!r} (options {list(answer.options)}, right answer {answer.reference!r})"
