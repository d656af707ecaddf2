"""`check=hf` and `check=generate`: how Hugging Face's own model, freshly loaded, judges an answer."""

from __future__ import annotations

import gc
import json
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from covering import sampled
from sweeping import ASK, jobs
from transformers import AttentionInterface

from experiments.embedded_pair.evaluate import DRAFTS
from specvlm.__main__ import main
from specvlm.app.compose import compose
from specvlm.app.hf_check import Agreement, ReferenceModel
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.prepare import check_reference
from specvlm.config import model_folder
from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, Output, autoregressive
from specvlm.errors import UserError
from specvlm.models import attention
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.load import load
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.qwen3_vl import Qwen3VL
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.results.rows import lines_of, rows_of, summary_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import Features, VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.video import read_video

GREEDY = GreedyVerifier()
LIMIT = 24
FAMILY = {"qwen2_5_vl": Qwen2_5_VL, "llava_onevision": LlavaOneVision, "qwen3_vl": Qwen3VL}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    MODEL_CACHE.clear()


@cache
def pristine(family: str, dtype: str) -> ReferenceModel:
    return ReferenceModel(model_folder(f"embedded:{family}/target"), getattr(torch, dtype), torch.device("cpu"))


@cache
def model(family: str, dtype: str, name: str = "target") -> VideoLM:
    return load(model_folder(f"embedded:{family}/{name}"), dtype)


@cache
def prompt(family: str, clip: str = "synthetic_1") -> VideoPrompt:
    return model(family, "float32").prompt("describe the video.", [read_video(find_clip(clip), frames=2)])


def answers(family: str, dtype: str, limit: int = LIMIT, clip: str = "synthetic_1") -> tuple[list[int], list[int]]:
    """Decode without and with a drafter, with the same model, weights and prompt."""
    target, draft, request = model(family, dtype), model(family, dtype, "plain"), prompt(family, clip)
    alone = tokens_of(list(autoregressive(target, request, limit, GREEDY)))
    graph = DecodingGraph(target, draft, UniformPruner(), TreeDrafter("chain:3"), GREEDY)
    return alone, tokens_of(list(graph.decode(request, limit)))


@cache
def right(family: str, dtype: str, clip: str = "synthetic_1") -> list[int]:
    return answers(family, dtype, clip=clip)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "generate"), sampled(list(DRAFTS), ["float32", "bfloat16"], [False, True], pairs=True), ids=str
)
def test_a_right_answer_is_identical(family, dtype, generate):
    clip = "synthetic_3" if family == "qwen3_vl" else "synthetic_1"  # there, two of its tokens nearly tie in bfloat16
    found = pristine(family, dtype).check(prompt(family, clip), right(family, dtype, clip), LIMIT, generate=generate)
    assert str(found) == "identical" and not found.differences


@pytest.mark.slow
def test_a_model_whose_forward_returns_all_logits_is_checked_too(monkeypatch):
    """Some models' forward has no `logits_to_keep`, such as VideoLLaMA 3's."""
    model, request, expected = pristine("qwen2_5_vl", "float32"), prompt("qwen2_5_vl"), right("qwen2_5_vl", "float32")
    real, shapes = model.hf.forward, []

    def whole(input_ids, use_cache=True, **inputs):
        assert "logits_to_keep" not in inputs
        out = real(input_ids=input_ids, use_cache=use_cache, **inputs)
        shapes.append(out.logits.shape[1])
        return out

    monkeypatch.setattr(model.hf, "forward", whole)
    assert str(model.check(request, expected, LIMIT)) == "identical"
    assert str(model.check(request, [*expected[:1], expected[1] + 1, *expected[2:]], LIMIT)).startswith("MISMATCH at token 1")
    assert set(shapes) == {len(request) + len(expected) - 1}


def positions_slip(family, monkeypatch):
    """Shift text after the video three positions back, as another M-RoPE rule would; reverse 1-D positions."""
    real = FAMILY[family].positions

    def slipped(self, request):
        found_AS, behind = real(self, request).clone(), int(request.video_index[-1]) + 1
        found_AS[:, behind:] -= 3
        return found_AS if len(found_AS) > 1 else found_AS.flip(1)

    monkeypatch.setattr(FAMILY[family], "positions", slipped)


def mask_slip(family, monkeypatch):
    """Hide the last four prompt tokens from the answer's rows."""

    def slipped(module, query, key, value, attention_mask, **named):
        rows, keys, prompted = query.shape[2], key.shape[2], len(prompt(family))
        seen_QK = (
            torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if attention_mask is None else attention_mask.clone()
        )
        seen_QK[..., prompted - 4 : prompted] &= keys <= prompted
        return attention.attend(module, query, key, value, seen_QK, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, slipped)


def feature_slip(family, monkeypatch):
    """Put a video's features in the wrong order."""
    changed_features(monkeypatch, backwards)


def changed_features(monkeypatch, change):
    """Let both ways to a video's features change them."""
    features, encoding = VideoLM.features, VideoLM.encoding

    def changed(self, *rest, **named):
        return change((yield from encoding(self, *rest, **named)))

    monkeypatch.setattr(VideoLM, "features", lambda self, *rest, **named: change(features(self, *rest, **named)))
    monkeypatch.setattr(VideoLM, "encoding", changed)


def backwards(features):
    return features[torch.arange(len(features)).flip(0)]


def embedding_slip(family, monkeypatch):
    """Embed a token as the next one of the vocabulary."""
    real = VideoLM.embed_tokens
    monkeypatch.setattr(VideoLM, "embed_tokens", lambda self, tokens_S: real(self, tokens_S + 1))


SLIPS = [positions_slip, mask_slip, feature_slip, embedding_slip]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "family"),
    sampled(
        [*(("float32", slip) for slip in SLIPS), ("bfloat16", positions_slip), ("bfloat16", feature_slip)],
        list(DRAFTS),
    ),
    ids=lambda of: of if isinstance(of, str) else f"{of[0]}-{of[1].__name__}",
)
def test_a_slip_in_shared_code_is_identical_by_ourselves_and_a_mismatch_by_hugging_face(family, of, monkeypatch):
    dtype, slip = of
    expected = right(family, dtype)
    slip(family, monkeypatch)
    alone, output = answers(family, dtype)
    assert output != expected, "the slip is of no matter here"
    assert str(lossless.compare(model(family, dtype), prompt(family), alone, output)) == "identical"
    found = pristine(family, dtype).check(prompt(family), output, LIMIT)
    assert str(found).startswith("MISMATCH at token "), str(found)
    wrong = next(part for part in found.differences if not part.explained)
    assert wrong.candidates[0] == output[wrong.token] != wrong.candidates[1] and wrong.gap > wrong.rounding > 0
    if dtype == "float32":
        by_generate = pristine(family, dtype).check(prompt(family), output, LIMIT, generate=True)
        assert str(by_generate).startswith("MISMATCH at token "), str(by_generate)
        first = by_generate.differences[0].token
        assert (
            output[:first] == expected[:first] and output[first] != expected[first] == by_generate.differences[0].candidates[1]
        )


@pytest.mark.slow
def test_an_answer_without_deepstacks_rows_is_a_mismatch(monkeypatch):
    expected = right("qwen3_vl", "float32")
    changed_features(monkeypatch, lambda found: Features(found.rows, torch.zeros_like(found.added)))
    alone, output = answers("qwen3_vl", "float32")
    assert output == alone != expected
    found = pristine("qwen3_vl", "float32").check(prompt("qwen3_vl"), output, LIMIT)
    assert str(found).startswith("MISMATCH at token "), str(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", DRAFTS)
def test_a_stop_id_that_is_ignored_is_a_mismatch(family, monkeypatch):
    target, clip = model(family, "float32"), read_video(find_clip("synthetic_3"), frames=2)
    request = target.prompt("how many objects appear?", [clip])

    def take(self, tokens):
        self.room -= len(tokens)
        return tuple(tokens)

    checks, right = pristine(family, "float32"), tokens_of(list(autoregressive(target, request, LIMIT, GREEDY)))
    monkeypatch.setattr(Output, "take", take)
    output = tokens_of(list(autoregressive(target, request, LIMIT, GREEDY)))
    assert len(right) < LIMIT == len(output) and output[: len(right)] == right
    for generate in (False, True):
        assert str(checks.check(request, right, LIMIT, generate=generate)) == "identical"
        found = str(checks.check(request, output, LIMIT, generate=generate))
        assert found == f"MISMATCH at token {len(right)}: the answer continues after stop token {right[-1]}"
        found = str(checks.check(request, right[:-1], LIMIT, generate=generate))
        assert found.startswith(
            f"MISMATCH at token {len(right) - 1}: the answer ends at {len(right) - 1} tokens, without a stop"
        )


@pytest.mark.slow
def test_the_second_best_token_is_a_tie_where_rounding_explains_its_gap_and_else_a_mismatch(monkeypatch):
    checks, request, output = pristine("qwen2_5_vl", "float32"), prompt("qwen2_5_vl"), right("qwen2_5_vl", "float32")
    with torch.inference_mode():
        best, second = checks._logits(request, output)[-1].topk(2)[1].tolist()
    assert best == output[-1]
    wrong = [*output[:-1], second]
    found = checks.check(request, wrong, LIMIT)
    (only,) = found.differences
    assert only.token == LIMIT - 1 and only.candidates == (second, best) and only.gap > 100 * only.rounding
    told = f"MISMATCH at token {LIMIT - 1}: Hugging Face's model prefers another token by {only.gap:.2g}, "
    assert str(found).startswith(told)
    assert checks.check(request, wrong, LIMIT) == found, "it is seeded"
    monkeypatch.setattr("specvlm.app.hf_check.ROUNDINGS", 1e9)
    assert str(checks.check(request, wrong, LIMIT)) == f"tie at token {LIMIT - 1} (gap {only.gap:.2g})"


@pytest.mark.slow
@pytest.mark.parametrize("family", DRAFTS)
def test_a_repetition_penalty_is_that_of_transformers_own_processor(family):
    target, request, checks = model(family, "float32"), prompt(family), pristine(family, "float32")
    steps = []
    for penalty in (1.0, 2.0):
        target.repetition_penalty = penalty
        steps.append(tokens_of(list(autoregressive(target, request, LIMIT, GREEDY))))
    target.repetition_penalty = 1.0
    plain, penalised = steps
    assert plain != penalised
    for generate in (False, True):
        assert str(checks.check(request, penalised, LIMIT, 2.0, generate)) == "identical"
        assert str(checks.check(request, penalised, LIMIT, 1.0, generate)).startswith("MISMATCH")


# On the command line

ONE = ["frames=2", "max_new_tokens=12", "hydra.run.dir=out"]
MANY = [*ASK, "frames=2", "dataset.scenes=3"]


def summary() -> dict:
    return json.loads(Path("out/summary.json").read_text())


# On GPUs the attention, the kernels and the order of every sum are other ones than on a CPU.


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["hf", "generate"])
@pytest.mark.parametrize("clip", ["synthetic_2", "bbb_apple"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", DRAFTS)
def test_a_captured_run_agrees(family, dtype, clip, how):
    words = [f"pair=embedded_{family}", f"dtype={dtype}", f"video={clip}", f"check={how}", "max_new_tokens=64"]
    assert main([*words, "device=cuda", "hydra.run.dir=out"]) == 0
    assert summary()["hf_check"] == "identical" or (dtype == "bfloat16" and summary()["hf_check"].startswith("tie")), summary()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", DRAFTS)
def test_a_split_target_is_checked_over_the_same_devices(family):
    assert main([*ONE, f"pair=embedded_{family}", "device=cuda", "target.parallel=layers", "check=hf"]) == 0
    assert summary()["hf_check"] == "identical"


@pytest.fixture
def alone(monkeypatch):
    """Fail if models of the pair still exist when the pristine one is loaded."""
    pair, make, init = [], load, ReferenceModel.__init__

    def loading(*rest, **named):
        made = make(*rest, **named)
        pair.extend(weakref.ref(part) for part in (made, made.hf, *made.hf.parameters()))
        return made

    def coming(self, *rest):
        gc.collect()
        assert pair and not any(part() is not None for part in pair), "the pair is still held"
        init(self, *rest)

    monkeypatch.setattr("specvlm.app.model_cache.load", loading)
    monkeypatch.setattr(ReferenceModel, "__init__", coming)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hf", "generate"])
def test_a_run_says_what_the_check_found(how, alone, capsys):
    assert main([*ONE, f"check={how}", "repetition_penalty=1.2"]) == 0
    assert summary()["hf_check"] == "identical" and summary()["hf_difference"] is None
    assert "check: identical by Hugging Face's own model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mismatch_by_the_check_alone_sets_the_exit_code(monkeypatch, capsys):
    feature_slip("qwen2_5_vl", monkeypatch)
    assert main([*ONE, "check=hf"]) == 1
    found = summary()
    assert found["verdict"] == "identical" and found["hf_check"].startswith("MISMATCH at token ")
    told = found["hf_difference"][0]
    assert set(told) == {"token", "candidates", "gap", "rounding", "candidate_texts"} and len(told["candidate_texts"]) == 2
    assert "MISMATCH at token" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_compared_says_why():
    for words, said in (
        ([], "not checked"),
        (["check=hf", "verifier=loose"], "lossy"),
        (["check=hf", "verifier=sampling"], "not checked: a sampled token need not be the argmax"),
    ):
        assert main([*ONE, "baseline=false", *words]) == 0
        assert summary()["hf_check"] == said, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["check=true"], "check=True: expected null, hf or generate"),
        (["check=HF"], "check=HF: expected null, hf or generate"),
        (
            ["check=hf", "target.weights=int8"],
            "makes it a different model: leave out target.weights or check",
        ),
        (["check=generate", "mrope=reference"], "differ from mrope=reference: use mrope=hf, or leave check out"),
    ],
)
def test_what_is_no_check_of_the_target_is_refused_at_once(words, said, capsys):
    assert main([*ONE, *words]) == 2
    assert said in capsys.readouterr().err and not Path("out").exists()


def test_quantised_checkpoints_and_ranks_are_refused():
    for words, method, said in (
        (["check=hf"], "awq", "does not support checkpoints quantised by awq: leave check out"),
        (["check=hf", "target.parallel=tensor"], None, "use target.parallel=layers, or leave check out"),
    ):
        with pytest.raises(UserError, match=said):
            check_reference(compose(words), SimpleNamespace(quantised=method, axes=3), None)


@pytest.mark.slow
def test_mrope_is_of_no_matter_to_a_family_without():
    assert main([*ONE, "check=hf", "mrope=reference", "pair=embedded_llava_onevision"]) == 0
    assert summary()["hf_check"] == "identical"


@pytest.fixture
def checked(monkeypatch):
    """Record calls of the reference check."""
    calls, real = [], ReferenceModel.check
    monkeypatch.setattr(ReferenceModel, "check", lambda self, *rest: calls.append(rest) or real(self, *rest))
    return calls


@pytest.mark.slow
def test_jobs_check_their_rows_behind_their_answers_and_equal_answers_once(checked, alone, capsys):
    assert main(["-m", *MANY, "pruner=uniform,random", "check=hf", "hydra.sweep.dir=out"]) == 0
    found = jobs(Path("out"))
    assert len(found) == 2 and len(checked) == 3
    for folder in found.values():
        rows = rows_of(folder)
        assert [row["hf_check"] for row in rows] == ["identical"] * 3 and all(row["hf_difference"] is None for row in rows)
        lines = lines_of(folder / "samples.jsonl")
        assert [line["hf_check"] for line in lines] == [None] * 3 + ["identical"] * 3
        assert {key: lines[0][key] for key in lines[0] if key != "hf_check"} == {
            key: rows[0][key] for key in rows[0] if key != "hf_check"
        }
        totals = summary_of(folder)
        assert totals["hf_checks"] == totals["verdicts"] == {"identical": 3} and totals["ok"] == 3
    shown = capsys.readouterr().out
    assert "check: scene-0002 pruner=random identical" in shown and "3 identical, check: 3 identical" in shown


@pytest.mark.slow
def test_a_check_that_is_broken_off_goes_on_with_resume(checked, monkeypatch, capsys):
    real = ReferenceModel.check

    def breaking(self, *rest):
        if len(checked) == 1:
            raise KeyboardInterrupt
        return real(self, *rest)

    words = [*MANY, "check=hf", "hydra.run.dir=out"]
    with monkeypatch.context() as broken:
        broken.setattr(ReferenceModel, "check", breaking)
        assert main(words) == 130
    assert [row["hf_check"] for row in rows_of(Path("out"))] == ["identical", None, None]
    assert "repeat the command with resume=true" in capsys.readouterr().out
    monkeypatch.setattr("specvlm.app.job.speculate", None)  # nothing is answered again
    assert main([*words, "resume=true"]) == 0 and len(checked) == 3
    assert [row["hf_check"] for row in rows_of(Path("out"))] == ["identical"] * 3
    assert main([*words, "resume=true"]) == 0 and len(checked) == 3


@pytest.mark.slow
def test_a_job_that_was_answered_without_a_check_can_be_checked_later(checked, monkeypatch, capsys):
    words = [*MANY, "hydra.run.dir=out"]
    assert main(words) == 0 and summary_of(Path("out"))["hf_checks"] == {}
    assert {row["hf_check"] for row in rows_of(Path("out"))} == {"not checked"}
    monkeypatch.setattr("specvlm.app.job.speculate", None)
    assert main([*words, "check=hf", "resume=true"]) == 0 and len(checked) == 3
    assert summary_of(Path("out"))["hf_checks"] == {"identical": 3}
    assert main([*words, "check=generate", "resume=true"]) == 2
    assert "was made with check=hf, this is check=generate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_that_cannot_be_checked_waits_and_a_mismatch_ends_with_one(monkeypatch, capsys):
    real, wrong = ReferenceModel.check, []

    def check(self, *rest):
        wrong.append(rest)
        if len(wrong) == 2:
            raise MemoryError("there is no room")
        return Agreement(fault=(1, "planted")) if len(wrong) == 3 else real(self, *rest)

    words = [*MANY, "check=hf", "hydra.run.dir=out"]
    with monkeypatch.context() as planted:
        planted.setattr(ReferenceModel, "check", check)
        assert main(words) == 1
    assert [row["hf_check"] for row in rows_of(Path("out"))] == ["identical", None, "MISMATCH at token 1: planted"]
    assert summary_of(Path("out"))["hf_checks"] == {"identical": 1, "MISMATCH": 1, "not checked": 1}
    assert "scene-0001 is not checked: MemoryError: there is no room" in capsys.readouterr().out
    assert main([*words, "resume=true"]) == 1
    assert [row["hf_check"] for row in rows_of(Path("out"))] == ["identical", "identical", "MISMATCH at token 1: planted"]
