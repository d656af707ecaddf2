"""`python -m specvlm.exact_probe`: what it counts, what it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter

import plain_forms
import pytest
import tiny
import torch

from specvlm.engine import Engine
from specvlm.exact_probe.__main__ import arithmetics, differences, main
from specvlm.models import fused_forms
from specvlm.models.fused import Forms

SMALL = ["video=synthetic_1", "frames=4", "max_new_tokens=20"]


def probed(folder, *words) -> tuple[int, dict]:
    code = main([*SMALL, f"hydra.run.dir={folder}", *words])
    return code, json.loads((folder / "exact_probe.json").read_text())


@pytest.mark.slow
def test_in_float32_no_best_token_differs(tmp_path, capsys):
    code, found = probed(tmp_path, "dtype=float32")
    said = capsys.readouterr().out
    assert code == 0 and found["positions"] == 20 and not found["exact"] and found["dtype"] == "float32"
    assert [(one["arithmetic"], one["rows"], one["positions"], one["best"]) for one in found["counts"]] == [
        (name, rows, 20 // rows * rows, 0) for name in ("specvlm", "sdpa", "eager") for rows in (2, 6, 16)
    ]
    assert "not exact by construction here" in said and "share of positions" in said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("differs", [True, False])
def test_an_engine_that_claims_too_much_is_a_mismatch(differs, tmp_path, monkeypatch):
    """Whether bits differ goes by the processor, so passes of many rows and of one are made to differ, or not to."""
    real = Engine.append

    def append(self, target, tokens_Q, cache):
        return torch.full_like(real(self, target, tokens_Q, cache), len(tokens_Q) if differs else 1)

    monkeypatch.setattr(Engine, "exact", lambda self, model: True)
    monkeypatch.setattr(Engine, "append", append)
    code, found = probed(tmp_path)  # bfloat16, the default
    ours = [one["bits"] for one in found["counts"] if one["arithmetic"] == "specvlm"]
    assert found["exact"] and found["dtype"] == "bfloat16" and all(bits > 0 if differs else bits == 0 for bits in ours)
    assert code == (1 if differs else 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_every_arithmetic_computes_the_same_logits_up_to_rounding(family):
    lm, prompt, answer = tiny.model(family), tiny.prompt(family), [5, 6, 7, 8, 9, 10, 11, 12]
    for name, append in arithmetics(lm, Engine()):
        (found,) = differences(name, append, lm, prompt, answer, [3], lambda: None)
        assert (found.positions, found.best) == (6, 0), name
    before = lm.hf.config.get_text_config()._attn_implementation
    assert before not in ("sdpa", "eager")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_hugging_faces_arithmetics_are_its_own_where_modules_run_fused(family, monkeypatch):
    lm, calls = tiny.wrap(tiny.copy.deepcopy(tiny.model(family).hf)), Counter[str]()
    lm.forms = forms = Forms(lm.hf, lm.axes, plain_forms)
    modeling = sys.modules[type(lm.text.layers[0]).__module__]
    for module, name in ((modeling, "eager_attention_forward"), (fused_forms, "attend"), (plain_forms, "norm")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, real=real, name=name, **more: calls.update([name]) or real(*given, **more)
        )
    found = {}
    for name, append in arithmetics(lm, Engine()):
        calls.clear()
        append(torch.tensor([5, 6, 7]), lm.new_cache(8))
        found[name] = {**calls}
    assert found["specvlm"].keys() == {"attend", "norm"} and found["sdpa"] == {}
    assert found["eager"] == {"eager_attention_forward": lm.layers} and lm.forms is forms


def test_a_row_that_depends_on_its_pass_is_counted():
    lm, prompt = tiny.model("llava_onevision"), tiny.prompt("llava_onevision")

    def append(tokens_Q, cache):
        logits_QV = Engine().append(lm, tokens_Q, cache)
        if len(tokens_Q) == 4:
            logits_QV[1, 3] += 1e3  # another best token
            logits_QV[2] *= 1.5  # the same best token
        return logits_QV

    with torch.inference_mode():
        two, four = differences("broken", append, lm, prompt, list(range(5, 13)), [2, 4], lambda: None)
    assert (two.best, four.positions, four.best) == (0, 8, 2) and four.bits >= 4


@pytest.mark.parametrize("word, said", [("--fast", "no options"), ("dataset=synthetic", "one video"), ("dtypo=x", "dtypo")])
def test_a_mistake_is_one_line(word, said, capsys, tmp_path):
    assert main([word, f"hydra.run.dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
