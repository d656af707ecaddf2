"""specvlm as a model of lmms-eval. Where lmms-eval is missing, stand-ins take the place of the few names used of it.

`make lmms` runs these tests beside lmms-eval itself, and its command line on the task of the embedded world.
"""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from session_pairs import all_at_once
from specvlm_lmms_eval import TASKS, manifest
from specvlm_lmms_eval.arguments import call_options, chosen_for_check, messages_of, pair_arguments

from specvlm import Options, UserError
from specvlm.decoding.slices import Slices
from specvlm.strategies import Answer
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.metrics.exact_match import ExactMatchMetric

HERE = Path(__file__).parent
LOGGED = [json.loads(line) for line in (HERE / "logged_by_lmms_eval_0_7_3.jsonl").read_text().splitlines()]
INSTALLED = find_spec("lmms_eval") is not None
OURS = "dataset=synthetic dataset.ask=question metric=exact_match metric.ignore_punctuation=true drafter=tree baseline=false"


# ---- generation_kwargs, model_args, messages -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"stop": (), "verifier": "greedy"}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"max_new_tokens": 16}),
        ({"max_gen_toks": 16, "until": None, "image_aspect_ratio": "original"}, {"max_new_tokens": 16}),
        ({"until": ["\n\n"]}, {"stop": ()}),
        ({"until": ["</s>", "\n\n"], "stop_sequences": "Q:"}, {"stop": ("</s>", "Q:")}),
        ({"temperature": 0.2, "do_sample": False}, {"verifier": "greedy"}),
        ({"temperature": 0.2}, {"verifier": {"name": "sampling", "temperature": 0.2}}),
        (
            {"do_sample": True, "top_p": 0.9, "seed": 7},
            {"seed": 7, "verifier": {"name": "sampling", "temperature": 1.0, "top_p": 0.9}},
        ),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ],
    ids=str,
)
def test_generation_kwargs_become_options(kwargs, expected):
    found = call_options(kwargs, Options())
    assert {name: found[name] for name in expected} == expected
    Options().asked(found)


def test_a_verifier_that_samples_keeps_its_name_and_one_that_cannot_is_refused():
    coupled = Options(verifier={"name": "coupled", "temperature": 2.0})
    assert call_options({"temperature": 0.5}, coupled)["verifier"] == {"name": "coupled", "temperature": 0.5}
    assert call_options({"temperature": 0}, coupled)["verifier"] == "greedy"
    assert call_options({"temperature": 0}, Options(verifier="loose"))["verifier"] == "loose"
    with pytest.raises(UserError, match=r"temperature=0.5: verifier=loose does not sample"):
        call_options({"temperature": 0.5}, Options(verifier="loose"))


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"n": 2}, {"visual_cot": True}, {"skip_special_tokens": False}], ids=str)
def test_generation_kwargs_that_would_change_the_answer_are_refused(kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(UserError, match=rf"^generation_kwargs: {name}={value} is not supported$"):
        call_options(kwargs, Options())


def test_model_args_are_checked_by_name_and_parsed():
    given = {"ratio": 0.5, "pruner": '{"name": "two_stage", "mass": 0.2}', "revision": "main"}
    assert pair_arguments(given) == given | {"pruner": {"name": "two_stage", "mass": 0.2}}
    for name, hint in {
        "draftt": 'Did you mean "draft"',
        "max_frames": "limit the frames with max_num_frames",
        "n": "--repeats",
        "temperature": "--gen_kwargs",
    }.items():
        with pytest.raises(UserError, match=rf'^model_args: there is no "{name}".*{hint}'):
            pair_arguments({name: 1})
    with pytest.raises(UserError, match=r"^model_args: pruner=\{two_stage\} is not valid JSON"):
        pair_arguments({"pruner": "{two_stage}"})


def test_messages_keep_their_order_and_sounds_and_sections_are_refused():
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "url": "a.mp4"}, {"type": "image", "url": 1}, {"type": "text", "text": "b"}],
        }
    ]
    parts = [{"type": "video", "video": "A.MP4"}, {"type": "image", "image": 1}, {"type": "text", "text": "b"}]
    assert messages_of(chat, str.upper) == [{"role": "user", "content": parts}]
    for part, reason in (
        ({"type": "audio", "url": 1}, "type audio"),
        ({"type": "video", "url": 1, "end_time": 2.0}, "end_time"),
    ):
        with pytest.raises(UserError, match=reason):
            messages_of([{"role": "user", "content": [part]}], str)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (1, 40), (0.25, 10), (0.1, 4)])
def test_a_share_of_the_answers_is_checked(share, count):
    assert sum(chosen_for_check(number, share) for number in range(40)) == count


# ---- the task of the embedded world ----------------------------------------------------------------------------------
def test_the_task_asks_what_the_data_set_asks():
    rows = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
    samples = SyntheticDataset(scenes=len(rows), ask="question").samples()
    assert rows == [{"scene": n, "question": s.question, "answer": s.answer} for n, s in enumerate(samples)]
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.safe_load((TASKS / "specvlm_synthetic.yaml").read_text())
    assert (task["dataset_kwargs"]["data_files"]["test"], task["doc_to_messages"]) == ("questions.jsonl", "scenes.messages")


def test_scores_of_lmms_eval_are_ours():
    metric, samples = ExactMatchMetric(ignore_punctuation=True), SyntheticDataset(scenes=len(LOGGED), ask="question").samples()
    ours = [metric.score(Answer(row["text"], s.answer)) for row, s in zip(LOGGED, samples, strict=True)]
    assert ours == [row["exact_match"] for row in LOGGED] and set(ours) == {0.0, 1.0}


# ---- the model -------------------------------------------------------------------------------------------------------
@dataclass
class Counts:
    input_tokens: int
    output_tokens: int

    def to_dict(self):
        return {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}


class Base:
    rank = 0

    def __init__(self):
        self.task_dict, self.cache_hook = {}, SimpleNamespace(add_partial=lambda *_: None)

    @classmethod
    def create_from_arg_string(cls, text, more=None):
        return cls(**dict(pair.split("=") for pair in text.split(",")), **(more or {}))

    def clean(self):
        pass


@pytest.fixture
def model_class(monkeypatch):
    """The class, on lmms-eval itself or on stand-ins."""
    if not INSTALLED:
        result = dataclass(type("GenerationResult", (), {"__annotations__": {"text": str, "token_counts": Counts}}))
        parts = {
            "lmms_eval.api.instance": {"TokenCounts": Counts, "GenerationResult": result, "Instance": object},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *_: None},
            "loguru": {"logger": logging.getLogger("loguru")},
        }
        for name, contents in parts.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "specvlm_lmms_eval.model", raising=False)
    return importlib.import_module("specvlm_lmms_eval.model").SpecVLM


def requests_of(model, scenes, **kwargs):
    """Make one request for each scene, as lmms-eval does. A scene named twice gives the same request twice."""
    rows = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
    sys.path.insert(0, str(TASKS))
    try:
        messages = importlib.import_module("scenes").messages
    finally:
        sys.path.remove(str(TASKS))
    model.task_dict = {"task": {"test": rows}}
    made = {n: SimpleNamespace(args=(rows[n]["question"], messages, kwargs, n, "task", "test")) for n in scenes}
    return [made[n] for n in scenes]


@pytest.mark.slow
def test_answers_are_those_that_lmms_eval_logged_whatever_the_batch_size(model_class):
    scenes = [8, 1, 9]  # the first answer is wrong
    model = model_class("embedded:qwen2_5_vl", batch_size="3", check=0.5)
    model.session.scheduler._scheduler.slices = Slices(60.0)  # else a slow machine lets them get out of step
    with all_at_once(model.session, len(scenes)):
        results = model.generate_until(requests_of(model, scenes, until=["\n\n"]))
    about = [result.token_counts.to_dict() for result in results]
    assert [result.text for result in results] == [LOGGED[n]["text"] for n in scenes]
    assert [one["tokens_per_round"] for one in about] == [LOGGED[n]["tokens_per_round"] for n in scenes]
    assert [one["verdict"] for one in about] == ["not checked", "identical", "not checked"]
    assert model.session.scheduler.run < model.session.scheduler.asked
    alone = model_class("embedded:qwen2_5_vl")
    assert [one.text for one in alone.generate_until(requests_of(alone, scenes))] == [one.text for one in results]


@pytest.mark.slow
def test_repeats_of_a_request_draw_different_answers_with_a_verdict(model_class):
    model = model_class("embedded:qwen2_5_vl", batch_size=3, max_num_frames=2)
    requests = requests_of(model, [8, 8, 8], temperature=5.0, max_new_tokens=6)
    results = model.generate_until(requests)
    assert len({result.text for result in results}) == 3
    assert {result.token_counts.to_dict()["verdict"] for result in results} == {"sampled"}
    assert [one.text for one in model.generate_until(requests)] == [one.text for one in results]


@pytest.mark.slow
def test_max_num_frames_limits_files_and_a_failure_names_its_sample(model_class):
    model = model_class("embedded:qwen2_5_vl", max_num_frames=4)
    (request,) = requests_of(model, [0], max_new_tokens=2)
    for url, frames in (("synthetic_1", 4), (model._video("synthetic_1").frames[:2], 2)):
        content = [{"type": "video", "url": url}, {"type": "text", "text": "describe the video ."}]
        request.args = ("", lambda _, c=content: [{"role": "user", "content": c}], *request.args[2:])
        assert model.generate_until([request])[0].token_counts.to_dict()["frames"] == frames
    request.args = ("", lambda _: [{"role": "user", "content": [{"type": "audio", "url": "x"}]}], *request.args[2:])
    with pytest.raises(UserError, match=r"^task, sample 0: a message has a part of type audio"):
        model.generate_until([request])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ratio=1", "there is no pretrained"),
        ("pretrained=embedded:qwen2_5_vl,drfter=tree", 'there is no "drfter".*Did you mean "drafter"'),
        ("pretrained=embedded:qwen2_5,batch_size=2", 'Did you mean "qwen2_5_vl"'),
        ("pretrained=x,batch_size=auto", "batch_size=auto: expected a number of requests"),
        ("pretrained=x,check=some", "check=some: expected"),
        ("pretrained=x,max_num_frames=few", "max_num_frames=few: expected"),
        ("pretrained=x,fps=1", "cannot be combined"),
    ],
)
def test_bad_model_args_end_the_command_with_one_line(model_class, capsys, text, reason):
    with pytest.raises(SystemExit) as ended:
        model_class.create_from_arg_string(text, {"max_num_frames": 4} if "fps" in text else None)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("specvlm: ")
    assert re.search(reason, said), said


# ---- with lmms-eval itself -------------------------------------------------------------------------------------------
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval: make lmms")


@needs_lmms_eval
def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model_manifest

    assert get_model_manifest("specvlm") == manifest()


@needs_lmms_eval
@pytest.mark.slow
def test_its_command_agrees_with_ours_sample_by_sample(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "SPECVLM_PLUGINS": ""}

    def run(*words):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done

    args = "--model specvlm --model_args pretrained=embedded:qwen2_5_vl,check=0.25 --tasks specvlm_synthetic --limit 12"
    done = run(
        "lmms_eval",
        *args.split(),
        "--include_path",
        str(TASKS),
        "--batch_size",
        "4",
        "--log_samples",
        "--output_path",
        "theirs",
    )
    assert "12 answers: 9 not checked, 3 identical" in done.stdout
    (log,) = tmp_path.glob("theirs/*/*_samples_specvlm_synthetic.jsonl")
    theirs = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: row["doc_id"])
    run("specvlm", *OURS.split(), "dataset.scenes=12", "hydra.run.dir=ours")
    ours = [json.loads(line) for line in (tmp_path / "ours" / "samples.jsonl").read_text().splitlines()]
    assert [row["exact_match"] for row in theirs] == [row["scores"]["exact_match"] for row in ours]
    assert {row["exact_match"] for row in theirs} == {0.0, 1.0}
    assert [row["filtered_resps"] for row in theirs] == [row["text"] for row in ours]
    for mine, row, frozen in zip(ours, theirs, LOGGED, strict=False):
        (counts,) = row["token_counts"]
        assert counts["tokens_per_round"] == mine["tokens_per_round"] == frozen["tokens_per_round"]
        assert (row["filtered_resps"], row["exact_match"]) == (frozen["text"], frozen["exact_match"])
