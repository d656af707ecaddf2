"""Metrics score as the published scripts do, and a job's scores reach its rows, totals and table."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from specvlm.__main__ import main
from specvlm.app import compose
from specvlm.app.console import RunConsole
from specvlm.app.scoring import Scorer
from specvlm.errors import UserError
from specvlm.results import scores
from specvlm.results.metrics import speed
from specvlm.results.mirror import Mirror, Tracking
from specvlm.results.rows import rows_of, summary_of
from specvlm.strategies import Answer, Metric, Sample, registry
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.metrics.accuracy import AccuracyMetric
from specvlm.strategies.metrics.exact_match import ExactMatchMetric
from specvlm.strategies.metrics.published import LMMS_EVAL, PUBLISHED, SOURCES, choice
from specvlm.strategies.metrics.rouge_l import RougeLMetric
from specvlm.video.clips import find_clip

TABLE = json.loads((Path(__file__).parent / "data" / "scoring.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_accuracy_agrees_with_the_published_script_and_with_lmms_eval(name):
    rows = TABLE["answers"][name]
    assert len(rows) >= 200
    for column, rule in ((2, "published"), (3, "lmms_eval")):
        metric, wrong = AccuracyMetric(rule), []
        for row in rows:
            options, right = TABLE["questions"][row[0]]
            found = metric.score(Answer(row[1], right, tuple(options), name))
            if found != pytest.approx(row[column]):
                wrong.append((row[1], options, right, found, row[column]))
        assert wrong == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_frozen_answers_are_of_every_kind(name):
    texts = {row[1] for row in TABLE["answers"][name]}
    assert {"", "A", "(A)", "A.", "a", "The answer is A", "None of the above", "Yes", "E"} <= texts
    assert any("sorry" in text for text in texts) and any("\n" in text for text in texts)
    for column in (2, 3):
        assert {row[column] for row in TABLE["answers"][name]} >= {0.0, 1.0}


def test_every_rule_names_its_script_and_version():
    assert set(SOURCES) == {*PUBLISHED.values(), *LMMS_EVAL.values(), choice}
    for name in PUBLISHED:
        assert " at " in AccuracyMetric().source(name) and AccuracyMetric("lmms_eval").source(name).startswith("lmms-eval")
        assert AccuracyMetric("choice").source(name) == "specvlm"


OPTIONS = ("A dog", "Two dogs", "A cat", "Nothing")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *((text, 1.0) for text in ("B", "(B)", "B.", "B) Two dogs", "B: it is", "The answer is (B).", "Answer: B", "two dogs")),
        *((text, 1.0) for text in ("I see two dogs.", " B\n", "Option B", "(B) because of A")),
        *(
            (text, 0.0)
            for text in ("A", "(C)", "E", "b", "", "A dog", "two dogs and a cat", "I cannot tell", "The answer is C")
        ),
    ],
)
def test_our_own_rule_for_choices(text, score):
    assert choice(Answer(text, "Two dogs", OPTIONS)) == score


@pytest.mark.parametrize(
    ("text", "right", "options", "score"),
    [
        *(("It is dark red.", right, ("red", "dark red", ""), float(right == "dark red")) for right in ("red", "dark red", "")),
        ("red or dark red", "dark red", ("red", "dark red"), 0.0),
        *((text, "1", ("1", "10"), float(text == "1 man")) for text in ("1 man", "10 men", "2 men")),
        *(("A woman.", right, ("man", "woman"), float(right == "woman")) for right in ("man", "woman")),
        ("答案是红色。", "红色", ("红色", "蓝色"), 1.0),
        ("(a+b)", "a+b", ("a+b", "a.b"), 1.0),
        ("Z", "o25", tuple(f"o{number}" for number in range(30)), 1.0),
    ],
)
def test_our_own_rule_tells_options_apart_that_contain_each_other(text, right, options, score):
    assert choice(Answer(text, right, options)) == score


def test_options_beyond_the_alphabet_have_no_letter_and_no_score():
    options = tuple(f"o{number}" for number in range(30))
    for name in (*PUBLISHED, "folder"):
        assert AccuracyMetric().score(Answer("o29", "o29", options, name)) is None


@pytest.mark.parametrize(("text", "reference"), [("a\u0300", "\u00e0"), ("\u00e0", "a\u0300"), ("ΟΔΟΣ", "οδος")])
def test_a_letter_is_itself_however_it_is_composed(text, reference):
    assert ExactMatchMetric().score(Answer(text, reference)) == 1.0


def test_accuracy_leaves_out_what_has_no_options_or_no_known_answer():
    for answer in (Answer("B"), Answer("B", "Two dogs"), Answer("B", None, OPTIONS), Answer("B", "A bird", OPTIONS)):
        assert AccuracyMetric().score(answer) is None


@pytest.mark.parametrize(
    ("fields", "text", "score"),
    [
        ({}, " Two  dogs\n", 1.0),
        ({}, "two dogs", 1.0),
        ({}, "two dogs.", 0.0),
        ({"ignore_case": False}, "two dogs", 0.0),
        ({"ignore_punctuation": True}, "two dogs.", 1.0),
    ],
)
def test_exact_match(fields, text, score):
    assert ExactMatchMetric(**fields).score(Answer(text, "Two dogs")) == score
    assert ExactMatchMetric(**fields).score(Answer(text)) is None


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    score = RougeLMetric().score(Answer("the cat sat on a mat", "the cat is on the mat"))
    assert score == pytest.approx(4 / 6)  # "the cat on mat", of six words each
    assert RougeLMetric().score(Answer("", "a cat")) == 0.0
    assert RougeLMetric(stem=True).score(Answer("dogs running", "dog runs")) == 1.0


def test_rouge_l_without_its_library_names_the_package(monkeypatch):
    monkeypatch.setattr("specvlm.strategies.metrics.rouge_l.find_spec", lambda name: None)
    cfg = compose.compose(["dataset=synthetic", "metric=rouge_l"])
    with pytest.raises(UserError, match=r"pip install 'specvlm\[metrics\]'"):
        Scorer(cfg, SyntheticDataset())


# ---- totals ----------------------------------------------------------------------------------------------------------


def row(score, alone=None, task="one", verdict="identical", text="x"):
    tokens = {"token_ids": [1], "baseline_token_ids": [1] if text == "x" else [2]}
    return {
        "scores": {"accuracy": score},
        "baseline_scores": {"accuracy": alone},
        "meta": {"task": task},
        "verdict": verdict,
    } | tokens


def test_totals_have_means_intervals_and_tasks():
    rows = [row(1.0, 1.0, "one"), row(0.0, 0.0, "one"), row(1.0, 1.0, "two"), row(1.0, 1.0, "two"), row(None, None, "two")]
    total = scores.totals_of(rows)["accuracy"]
    assert (total["mean"], total["scored"], total["unscored"], total["baseline"]) == (0.75, 4, 1, 0.75)
    assert total["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert total["by"]["task"]["one"]["mean"] == 0.5 and total["by"]["task"]["two"]["mean"] == 1.0
    assert total["mean_by"] == {"task": 0.75}
    uneven = scores.totals_of([*rows, *[row(1.0, 1.0, "two")] * 6])["accuracy"]
    assert (uneven["mean"], uneven["mean_by"]["task"]) == (0.9, 0.75)
    assert scores.totals_of([row(None)]) == {} == scores.totals_of([{}])


def test_the_interval_of_a_share_is_wilsons():
    low, high = scores.wilson([1.0] * 15 + [0.0] * 5)  # Newcombe (1998) gives such intervals
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    assert scores.mean_of([1.0] * 10)["low"] == pytest.approx(10 / (10 + scores.Z**2))
    assert scores.mean_of([1.0])["low"] is None


def test_other_scores_have_a_bootstrap_interval_that_repeats():
    some = [0.1, 0.5, 0.25, 0.9, 0.4, 0.6]
    one, other = scores.mean_of(some), scores.mean_of(some)
    assert one == other and min(some) < one["low"] < one["mean"] < one["high"] < max(some)


def test_keys_with_a_value_per_sample_are_no_tasks():
    rows = [row(1.0) | {"meta": {"task": f"t{n % 2}", "name": f"n{n}", "length": n / 3, "same": "x"}} for n in range(8)]
    assert scores.group_keys(rows) == ["task"]


def test_a_lossy_rule_is_told_what_it_costs():
    rows = [row(1.0, 1.0, verdict="lossy"), row(0.0, 1.0, verdict="lossy", text="y"), row(0.0, 0.0, verdict="lossy", text="y")]
    assert scores.differing(rows) == {"differ": 2, "compared": 3}
    assert scores.totals_of(rows)["accuracy"]["gain"]["mean"] == pytest.approx(-1 / 3)
    assert scores.differing([row(1.0)]) is None


# ---- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raising(Metric):
    name = "raising"

    def score(self, answer):
        torch.set_default_dtype(torch.float64)  # which would change every later answer
        return {"one": 0.5, "two": float("inf"), "four": 1e200, "five": 10**400, "six": float("nan")}[answer.sample]


def scorer(monkeypatch, notes):
    cfg = compose.compose(["dataset=synthetic", "metric=exact_match"])
    made = Scorer(cfg, SyntheticDataset(), notes.append)
    monkeypatch.setattr(made, "metrics", [ExactMatchMetric(), Raising()])
    return made


class Words:
    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.mark.parametrize(
    ("sample", "raising", "noted"),
    [
        *(("one", 0.5, ""), ("two", None, "inf"), ("three", None, "KeyError")),
        *(("four", None, "1e+200"), ("five", None, "1000"), ("six", None, "nan")),  # no later command could read these
    ],
)
def test_a_metric_that_fails_leaves_the_answer(monkeypatch, sample, raising, noted):
    notes: list[str] = []
    found = scorer(monkeypatch, notes).row(
        Sample(sample, Path("x"), "?", "1 2"), {"text": "1 2", "baseline_token_ids": [1, 3], "out_of_memory": None}, Words()
    )
    assert found == {
        "scores": {"exact_match": 1.0, "raising": raising},
        "baseline_scores": {"exact_match": 0.0, "raising": raising},
    }
    assert all(noted in note and "metric=raising" in note for note in notes) and bool(notes) == bool(noted)
    assert torch.get_default_dtype() == torch.float32


def test_what_is_cut_short_or_has_no_baseline(monkeypatch):
    made, sample = scorer(monkeypatch, []), Sample("one", Path("x"), "?", "1 2")
    assert made.row(sample, {"text": "1", "baseline_token_ids": None, "out_of_memory": "decoding"}, Words()) == {}
    found = made.row(sample, {"text": "1", "baseline_token_ids": None, "out_of_memory": None}, Words())
    assert found["baseline_scores"] is None and found["scores"]["exact_match"] == 0.0


def test_data_sets_choose_their_own_metric():
    own = {name: info.cls.metrics for name, info in registry.collect()["dataset"].items()}
    assert all(own[name] == ("accuracy",) for name in (*PUBLISHED, "folder")) and own["synthetic"] == ()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["metric=accuracy"], "give dataset="),
        (["metric=acuracy", "dataset=synthetic"], 'Did you mean "accuracy"'),
        (["metric=accuracy", "metric.rule=x", "dataset=synthetic"], "published or lmms_eval or choice"),
        (["metric=[accuracy,exact_match]", "dataset=synthetic"], "expected one by name"),
    ],
)
def test_a_wrong_metric_is_refused_in_one_line(words, says):
    with pytest.raises(UserError, match=says) as refused:
        compose.compose(words)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_scores_reach_rows_totals_and_the_table(tmp_path, capsys):
    words = ["dataset=synthetic", "dataset.ask=question", "dataset.scenes=3", "frames=4", "max_new_tokens=16"]
    job = tmp_path / "job"
    assert main([*words, "metric=exact_match", "verifier=loose", f"hydra.run.dir={job}"]) == 0
    rows, summary = rows_of(job), summary_of(job)
    same = ExactMatchMetric()
    assert [found["scores"]["exact_match"] for found in rows] == [
        same.score(Answer(found["text"], found["answer"])) for found in rows
    ]
    total, lossy = summary["scores"]["exact_match"], summary["lossy"]
    assert total["mean"] == pytest.approx(sum(found["scores"]["exact_match"] for found in rows) / 3)
    assert total["scored"] == 3 and total["baseline"] is not None and not math.isnan(total["gain"]["mean"])
    assert lossy["compared"] == 3 and summary["metrics"]["exact_match"].startswith("ExactMatchMetric(")
    out = capsys.readouterr().out
    assert out.count("exact_match") >= 4 and f"exact_match {total['mean']:.3f}" in out  # three samples, and the table


@pytest.mark.slow
def test_a_folder_of_choices_is_scored_without_being_asked_and_by_task(tmp_path):
    shutil.copy(find_clip("synthetic_1"), tmp_path / "one.mp4")
    ask = {"video": "one.mp4", "question": "how many objects appear ?", "options": ["four objects", "two"]}
    lines = [ask | {"id": str(n), "answer": ask["options"][n % 2], "task": ("count", "other")[n // 2]} for n in range(4)]
    del lines[3]["answer"]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["dataset=folder", f"dataset.root={tmp_path}", "frames=4", "max_new_tokens=8", "baseline=false"]
    assert main([*words, f"hydra.run.dir={tmp_path / 'job'}"]) == 0
    rows, summary = rows_of(tmp_path / "job"), summary_of(tmp_path / "job")
    wanted = [choice(Answer(found["text"], found["answer"], tuple(found["options"]))) for found in rows[:3]]
    assert [found["scores"]["accuracy"] for found in rows] == [*wanted, None]
    assert all(found["baseline_scores"] is None for found in rows)
    total = summary["scores"]["accuracy"]
    assert (total["scored"], total["unscored"], total["baseline"], total["gain"]) == (3, 1, None, None)
    assert summary["metrics"] == {"accuracy": "AccuracyMetric(rule='published'), specvlm"}


def test_the_table_shows_scores_and_what_a_lossy_rule_changes(capsys):
    found = {"ok": 4, "samples": 4, "failed": 0, "skipped": 0, "verdicts": {"lossy": 4}, "lossy": {"differ": 3, "compared": 4}}
    found["scores"] = {"accuracy": {"mean": 0.5, "scored": 4, "baseline": 0.75}}
    RunConsole().jobs([("one", found)], "", None, "")
    out = " ".join(capsys.readouterr().out.split())
    assert "accuracy 0.500 (target 0.750)" in out and "4 lossy, 3 of 4 differ from the target's own" in out


def test_the_mirror_gets_every_score():
    logged: list[tuple] = []
    mirror = Mirror(Tracking(registry.settings("tracker", {"name": "wandb"}), logged.append))
    mirror.run = SimpleNamespace(log=lambda *point: logged.append(point))
    mirror.sample({"sample": "a", "index": 0, "scores": {"accuracy": 1.0, "rouge_l": None}}, [])
    assert logged == [("sample", 0, {"score_accuracy": 1.0})]


def test_decoding_never_takes_less_than_no_time():
    """It is a difference of sums, which rounding may put below zero where nothing was decoded."""
    random = Random(0)
    for _ in range(200):
        times = {part: random.random() for part in ("vision", "prefill", "prune", "draft_prefill", "capture")}
        assert speed(times, 1)["decode_s"] >= 0
