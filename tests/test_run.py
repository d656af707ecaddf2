"""Whole runs through the command line: what they write, show and return, and how bad input ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import av
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from towers import videos_encoded_once
from transformers.utils import logging

from specvlm import load
from specvlm.__main__ import main
from specvlm.app import compose
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.placement import places_of
from specvlm.app.prepare import own_sample, plan, read, set_up
from specvlm.config import model_folder
from specvlm.errors import UserError
from specvlm.models import memory_plan
from specvlm.models.load import skeleton
from specvlm.models.text_passes import CHUNK
from specvlm.models.video_lm import PATCHES, VideoLM
from specvlm.results import metrics
from specvlm.testing import tiny
from specvlm.video.clips import find_clip

SHORT = ["max_new_tokens=14", "question=how many objects appear?"]
FAST = ["frames=4", *SHORT]  # where the answer need not be true


@pytest.fixture(autouse=True, scope="module")
def videos_once():
    with videos_encoded_once():
        yield


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def runs(folder: Path = Path("out")) -> tuple[dict, list[dict]]:
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), steps


def copy_of(name: str, **changes) -> Path:
    folder = shutil.copytree(model_folder(f"embedded:qwen2_5_vl/{name}"), Path(name))
    for file, change in changes.items():
        path = folder / file.replace("_json", ".json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["embedded_qwen2_5_vl", "embedded_llava_onevision", "embedded_qwen3_vl"])
def test_a_run_writes_its_config_steps_and_summary(pair, capsys):
    assert main(["pruner=two_stage", "ratio=0.9", f"pair={pair}", "hydra.run.dir=out", *SHORT]) == 0
    summary, steps = runs()
    assert set(summary) == set(metrics.KEYS) and summary["verdict"] == "identical"
    assert summary["token_ids"] == summary["baseline_token_ids"] == [t for step in steps for t in step["tokens"]]
    assert summary["kept_tokens"] == len(steps[1]["kept"]) == int(summary["video_tokens"] * 0.1) == 102
    assert summary["rounds"] == len(steps) - 1 and summary["new_tokens"] == len(summary["token_ids"])
    parts = sum(seconds for part, seconds in summary["times_s"].items() if part != "video")
    assert abs(parts - summary["end_to_end_s"]) < 1e-6
    assert OmegaConf.load("out/config.yaml").pruner.name == "two_stage"
    shown = capsys.readouterr().out
    assert "keeps 102 of" in shown and "memory plan" in shown and "identical" in shown
    count = "five" if pair == "embedded_qwen3_vl" else "four"  # there are four: this target is wrong about the clip
    assert f"{count} objects appear on a checkered navy background." in shown
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.yaml", "steps.jsonl", "summary.json"]


@pytest.mark.slow
def test_a_run_tells_what_was_refused_and_where_asked_what_was_attended_to():
    words = ["pruner=random", "ratio=0.95", "frames=8", "max_new_tokens=40", "hydra.run.dir=out"]
    assert main([*words, "record=true"]) == 0
    summary, steps = runs()
    for step in steps[1:]:
        assert len(step.get("refused", [])) == (5 - step["accepted"] if step["full"] else 0)
    wrong = [step for step in steps if step.get("refused")]
    assert wrong and all(step["refused"][0] != step["tokens"][-1] for step in wrong)
    attention_N = load_file("out/attention/0.safetensors")["verifier_attention"]
    assert attention_N.dtype == torch.float16 and attention_N.shape == (summary["video_tokens"],)
    assert attention_N.min() >= 0 and abs(attention_N.float().mean() - 1) < 1e-3
    assert main(words) == 0
    assert not Path("out/attention").exists() and runs()[0]["token_ids"] == summary["token_ids"]


@pytest.mark.slow
def test_a_sweep_makes_a_folder_for_each_of_its_six_runs():
    assert main(["-m", "pruner=two_stage,uniform,random", "ratio=0.5,0.9", "hydra.sweep.dir=sweep", *FAST]) == 0
    summaries = [runs(path.parent)[0] for path in sorted(Path("sweep").glob("*/summary.json"))]
    assert len(summaries) == 6 and {s["verdict"] for s in summaries} == {"identical"}
    assert sorted(s["kept_tokens"] for s in summaries) == [12] * 3 + [64] * 3


@pytest.mark.slow
def test_drafters_without_a_draft_model_and_sampling_run_too(capsys):
    assert main(["drafter=prompt_lookup", "hydra.run.dir=a", "draft.path=nowhere", *FAST]) == 0
    assert main(["drafter=self", "drafter.shape=chain:2", "hydra.run.dir=b", "draft.path=nowhere", *FAST]) == 0
    assert main(["verifier=sampling", "verifier.temperature=0.7", "hydra.run.dir=c", *FAST]) == 0
    assert [runs(Path(folder))[0]["verdict"] for folder in "abc"] == ["identical", "identical", "sampled"]


@pytest.mark.slow
def test_a_mismatch_is_called_one_and_sets_the_exit_code(monkeypatch, capsys):
    from specvlm.decoding.loop import Output

    take = Output.take
    seen = []

    def faulty(self, tokens):
        seen.append(1)
        return take(self, [5 if len(tokens) > 1 else token for token in tokens])

    monkeypatch.setattr(Output, "take", faulty)
    assert main(["hydra.run.dir=out", *FAST]) == 1
    assert runs()[0]["verdict"].startswith("MISMATCH at token") and "MISMATCH" in capsys.readouterr().out


def without_weights() -> list[str]:
    (copy_of("target") / "model.safetensors").unlink()
    return ["target.path=target"]


def cut_weights() -> list[str]:
    path = copy_of("target") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    return ["target.path=target"]


def weights_of_another_shape() -> list[str]:
    path = copy_of("target") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.language_model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, {"format": "pt"})
    return ["target.path=target"]


def a_missing_tensor() -> list[str]:
    path = copy_of("target") / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "model.layers.3.mlp" not in n}, path, {"format": "pt"})
    return ["target.path=target"]


def broken_tokenizer() -> list[str]:
    (copy_of("target") / "tokenizer.json").write_text("{}")
    return ["target.path=target"]


def wrong_config() -> list[str]:
    copy_of("target", config_json=lambda content: content["text_config"].update(hidden_size="x"))
    return ["target.path=target"]


def other_tokenizer() -> list[str]:
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]

    copy_of("plain", tokenizer_json=swap)
    return ["draft.path=plain"]


def other_model_type() -> list[str]:
    copy_of("target", config_json=lambda content: content.update(model_type="llama"))
    return ["target.path=target"]


def truncated_video() -> list[str]:
    content = find_clip("bbb_apple").read_bytes()
    Path("cut.mp4").write_bytes(content[: len(content) // 2])
    return ["video=cut.mp4"]


def video_without_frames() -> list[str]:
    with av.open("none.mp4", "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    return ["video=none.mp4"]


def template_without_question() -> list[str]:
    folder = copy_of("target")
    (folder / "chat_template.jinja").write_text("<|vision_start|><|video_pad|>")
    return ["target.path=target"]


def text_as_video() -> list[str]:
    Path("note.mp4").write_text("not a video")
    return ["video=note.mp4"]


BAD = {
    "missing file": (lambda: ["video=nowhere.mp4"], "nowhere.mp4"),
    "unknown clip": (lambda: ["video=sinthetic_1"], 'Did you mean "synthetic_1"?'),
    "a folder": (lambda: ["video=."], "folder"),
    "not a video": (text_as_video, "note.mp4"),
    "truncated video": (truncated_video, "truncated"),
    "zero frames": (video_without_frames, "none.mp4"),
    "no text after the video": (template_without_question, "no text follows the video"),
    "empty file": (lambda: Path("empty.mp4").touch() or ["video=empty.mp4"], "empty"),
    "too many frames": (lambda: ["frames=4000"], "frames"),
    "ratio below": (lambda: ["ratio=-0.1"], "ratio"),
    "ratio above": (lambda: ["ratio=1.5"], "ratio"),
    "wrong type": (lambda: ["ratio=lots"], "ratio"),
    "unknown pruner": (lambda: ["pruner=two_stagge"], 'Did you mean "two_stage"?'),
    "misspelt group": (lambda: ["prunner=uniform"], 'Did you mean "pruner"?'),
    "no tokens": (lambda: ["max_new_tokens=0"], "max_new_tokens"),
    "tree shape": (lambda: ["drafter.shape=bushy"], "chain:5"),
    "no such model": (lambda: ["target.path=./nowhere"], "no such model folder"),
    "not a model": (lambda: ["target.path=."], "config.json"),
    "no weights": (without_weights, "no *.safetensors"),
    "cut weights": (cut_weights, "cannot be loaded"),
    "weights of another shape": (weights_of_another_shape, "cannot be loaded"),
    "a missing tensor": (a_missing_tensor, "lack 3 tensors"),
    "broken tokenizer": (broken_tokenizer, "tokenizer cannot be loaded"),
    "wrong config": (wrong_config, "config.json cannot be used"),
    "too wide a tree": (lambda: ["drafter.shape=300x2"], "guesses per node"),
    "unknown reference": (lambda: ["ratio=${y}"], "y"),
    "other tokenizer": (other_tokenizer, "different tokenizers"),
    "other family": (lambda: ["draft.path=embedded:llava_onevision/plain"], "a pair needs one family"),
    "other model type": (other_model_type, "not supported"),
    "max_pixels of LLaVA": (lambda: ["pair=embedded_llava_onevision", "max_pixels=10"], "nothing to limit"),
    "special token": (lambda: ["question=what is <|video_pad|>?"], "<|video_pad|>"),
    "bf16 weights in float32": (lambda: ["target.weights=bf16"], "target.weights=bf16, but dtype comes out as float32"),
    "no CUDA": (lambda: ["device=cuda:7"], "cuda"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_code_2_and_writes_nothing(case, capfd):
    make, expected = BAD[case]
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    words = make()
    before = sorted(Path().rglob("*"))
    assert main([*words, "hydra.run.dir=out/deep"]) == 2
    captured = capfd.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("specvlm: ") and expected in lines[0], captured.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
def test_one_frame_is_enough():
    assert main(["frames=1", "hydra.run.dir=out", *SHORT]) == 0
    assert runs()[0]["video_tokens"] == 64


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_that_names_the_folder_and_leaves_nothing(monkeypatch, capfd):
    def full(path, mode="rb", *args):
        assert "w" in mode and path.name == "steps.jsonl"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("specvlm.results.folder.open_regular", full)
    assert main(["hydra.run.dir=out", *FAST]) == 2
    error = capfd.readouterr().err
    assert "No space left on device" in error and "out" in error and not Path("out").exists()


@pytest.mark.slow
def test_a_run_into_the_folder_of_another_leaves_no_old_summary(monkeypatch):
    assert main(["hydra.run.dir=out", *FAST]) == 0
    monkeypatch.setattr("specvlm.app.run.summarize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["hydra.run.dir=out", *FAST]) == 130
    assert not Path("out/summary.json").exists()


def out_of_memory_at(monkeypatch, passes: int) -> None:
    """Let the target's n-th pass fail, and every later one."""
    forward, seen = VideoLM.forward, []

    def failing(self, *args, **named):
        seen.append(1)
        if len(seen) >= passes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **named)

    monkeypatch.setattr(VideoLM, "forward", failing)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["chain", "prompt_lookup"])
def test_out_of_memory_ends_with_one_line_and_leaves_what_was_done(drafter, monkeypatch, capfd):
    words = [f"drafter={drafter}", *FAST]
    MODEL_CACHE.warm.clear()
    passes, forward = [], VideoLM.forward
    monkeypatch.setattr(VideoLM, "forward", lambda self, *a, **n: passes.append(1) or forward(self, *a, **n))
    assert main([*words, "hydra.run.dir=whole"]) == 0
    whole, _ = runs(Path("whole"))
    capfd.readouterr()
    met = set()
    for share in (0, 0.15, 0.25, 0.4, 0.6, 0.75, 1):
        with monkeypatch.context() as patch:
            patch.setattr(VideoLM, "forward", forward)
            MODEL_CACHE.warm.clear()
            out_of_memory_at(patch, max(1, int(len(passes) * share)))
            assert main([*words, "hydra.run.dir=out"]) == 2
        captured = capfd.readouterr()
        assert len(captured.err.strip().splitlines()) == 1 and "ran out of memory while" in captured.err, captured.err
        summary = json.loads(Path("out/summary.json").read_text())
        assert set(summary) == set(metrics.KEYS) and summary["verdict"] == "not checked"
        assert f"{summary['new_tokens']} tokens are in" in captured.err and summary["out_of_memory"] in captured.err
        assert summary["token_ids"] == whole["token_ids"][: summary["new_tokens"]]
        assert summary["text"] in captured.out and Path("out/config.yaml").is_file()
        if summary["out_of_memory"] != "decoding":  # the baseline comes first
            assert summary["new_tokens"] == 0 and not Path("out/steps.jsonl").exists()
        else:
            assert summary["token_ids"] == [t for step in runs()[1] for t in step["tokens"]]
        met.add(summary["out_of_memory"])
    assert met == {"warming up", "decoding", "decoding without a drafter"} and whole["out_of_memory"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuda", "cpu", "cublas"],
)
def test_out_of_memory_while_checking_keeps_both_answers(error, monkeypatch, capfd):
    def full(*_):
        raise error

    monkeypatch.setattr("specvlm.app.request.lossless.compare", full)
    assert main(["hydra.run.dir=out", *FAST]) == 2
    summary, _ = runs()
    assert "ran out of memory while checking" in capfd.readouterr().err and summary["out_of_memory"] == "checking"
    assert summary["token_ids"] == summary["baseline_token_ids"] and summary["speedup_decode"] and summary["text"]


@pytest.mark.slow
def test_another_error_is_no_lack_of_memory(monkeypatch, capfd):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("specvlm.app.request.lossless.compare", broken)
    assert main(["hydra.run.dir=out", *FAST]) == 3
    error = capfd.readouterr().err
    assert "RuntimeError: shapes do not match" in error and "ran out of memory" not in error


@pytest.mark.slow
def test_out_of_memory_while_loading_writes_nothing(monkeypatch, capfd):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    MODEL_CACHE.clear()
    monkeypatch.setattr("specvlm.app.model_cache.load", full)
    assert main(["hydra.run.dir=out", *FAST]) == 2
    error = capfd.readouterr().err
    assert "ran out of memory while loading" in error and "tokens are in" not in error and not Path("out").exists()


@pytest.mark.slow
def test_the_threads_of_one_job_are_not_those_of_the_next(monkeypatch):
    seen = []
    real = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.append(count) or real(count))
    monkeypatch.setattr(
        "specvlm.app.run.set_up", lambda cfg, places: (_ for _ in ()).throw(UserError(str(torch.get_num_threads())))
    )
    assert main(["-m", "threads=2,3,null", "hydra.sweep.dir=sweep", *FAST]) == 2
    assert seen == [2, 1, 3, 1, 1] and torch.get_num_threads() == 1


def test_loading_by_the_api_shows_no_bars_and_leaves_them_as_they_were(capfd):
    logging.enable_progress_bar()
    lm = load(model_folder("embedded:qwen2_5_vl/plain"))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "") and logging.is_progress_bar_enabled() and lm.layers
    load(model_folder("embedded:qwen2_5_vl/plain"), progress=True)
    assert "Loading weights" in capfd.readouterr().err
    logging.disable_progress_bar()
    load(model_folder("embedded:qwen2_5_vl/plain"))
    assert not logging.is_progress_bar_enabled()


def test_the_memory_plan_counts_the_rows_of_experts():
    lm = tiny.model("qwen3_vl_moe")
    config, need = lm.hf.config.get_text_config(), memory_plan.Need(lm, 1000, torch.bfloat16)
    passes = memory_plan.activations([need], 0) - 2 * 1000 * config.hidden_size * (1 + lm.levels) * 2
    assert passes == 1000 * (4 * config.num_experts_per_tok + 4) * config.hidden_size * 2


def test_the_memory_plan_is_bounded_by_the_chunks_of_a_prefill_and_of_the_vision_tower(monkeypatch):
    lm = skeleton(model_folder("embedded:qwen2_5_vl/target"))

    def activations(slots: int, patches: int) -> int:
        return memory_plan.activations([memory_plan.Need(lm, slots, torch.bfloat16)], patches)

    width = lm.hf.config.get_text_config().hidden_size
    plain, held = (memory_plan.activations([memory_plan.Need(lm, 64, torch.bfloat16, signals=count)], 0) for count in (0, 1000))
    assert held - plain == 1000
    more = activations(2 * CHUNK, 0) - activations(CHUNK, 0)
    assert more == 2 * CHUNK * width * 2 and activations(CHUNK, 0) - activations(CHUNK - 1, 0) > 2 * width * 2
    assert lm.vision_rows({"thw": (1000, 32, 32)}) == PATCHES and lm.vision_rows({"thw": (3, 200, 200)}) == 40_000


@pytest.mark.slow
def test_what_strategies_read_of_the_target_is_planned():
    def activations(*words: str) -> int:
        cfg = compose.jobs(["pair=embedded_llava_onevision", *words], sweep=False)[0].cfg
        setup = set_up(cfg, places_of(cfg))
        (planned,) = plan(setup, read(setup, own_sample(cfg))).plans.values()
        return planned.parts["activations (estimate)"]

    lm = skeleton(model_folder("embedded:llava_onevision/target"))
    video, width = 1025, lm.hf.config.get_text_config().hidden_size
    assert activations("verifier=loose") - activations() == video * width * 4
    scores = lm.layers * lm.kv_heads * video
    alone = activations("drafter=self", "drafter.shape=chain:9")
    assert activations("drafter=sparse") - alone == scores * (4 + 4 + 8)  # float32, sorted, and the order
    assert activations("drafter=sparse", "verifier=loose") - alone == scores * 16 + video * width * 4


def test_memory_that_torch_keeps_for_itself_is_free(monkeypatch):
    for name, value in (("mem_get_info", (500, 1000)), ("memory_reserved", 300), ("memory_allocated", 120)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert memory_plan.free_bytes(torch.device("cuda")) == 500 + 180


@pytest.mark.slow
def test_prompt_lookup_says_that_it_saw_no_video(capsys):
    assert main(["drafter=prompt_lookup", "hydra.run.dir=out", *FAST]) == 0
    assert runs()[0]["kept_tokens"] is None and "drafter saw" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_quantised_models_is_the_quantised_targets_own_output_and_says_so(capsys):
    assert main(["target.weights=int8", "draft.weights=int4", "hydra.run.dir=out", *FAST]) == 0
    summary, _ = runs()
    assert summary["verdict"] == "identical" and summary["weights"] == {"target": "int8", "draft": "int4"}
    assert "quantised: target int8, draft int4" in capsys.readouterr().out
    assert main(["drafter=self", "drafter.shape=chain:2", "target.weights=fp8", "hydra.run.dir=out", *FAST]) == 0
    assert runs()[0]["weights"] == {"target": "fp8"}


@pytest.mark.slow
def test_a_draft_in_8_bits_guesses_nearly_as_well():
    accepted = []
    for weights in ("null", "int8", "fp8"):
        assert main([f"draft.weights={weights}", "frames=8", "max_new_tokens=80", "baseline=false", "hydra.run.dir=out"]) == 0
        accepted.append(runs()[0]["accepted_per_round"])
    assert min(accepted[1:]) > accepted[0] - 0.5, accepted
