"""What the drafter saw, of real runs of both families: the frames' grid, what was kept, words of every round."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from specvlm.__main__ import main
from specvlm.report.reading import read_jobs
from specvlm.report.seen import Round, rounds_of, see, spell, target_of

FAST = ["max_new_tokens=30", "record=true", "ratio=0.95"]

pytestmark = pytest.mark.slow  # it runs the embedded pairs


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_onevision"])
def run(request, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert main([f"pair=embedded_{request.param}", "pruner=two_stage", f"hydra.run.dir={folder}", *FAST]) == 0
    return folder


def test_frames_kept_tokens_heat_and_words_are_the_runs_own(run):
    jobs = read_jobs([run])
    seen = see("synthetic_1", jobs, 48)
    (view,) = seen.views
    summary, steps = json.loads((run / "summary.json").read_text()), [json.loads(s) for s in (run / "steps.jsonl").open()]
    assert not seen.problem and len(seen.grid) == summary["video_tokens"] and len(seen.frames) == seen.grid.frames
    assert seen.seconds == sorted(seen.seconds) and seen.seconds[0] == 0 and max(seen.frames[0].size) <= 384
    assert view.kept == steps[1]["kept"] and len(view.kept) == summary["kept_tokens"]
    np.testing.assert_array_equal(view.heat, load_file(run / "attention" / "0.safetensors")["verifier_attention"].float())
    said = "".join("".join(one.accepted) + (one.own or "") for one in view.rounds)
    assert said == summary["text"] and len(view.rounds) == summary["rounds"] + 1
    assert any(one.refused for one in view.rounds)


def test_what_the_page_gets_unpacks_to_what_was_recorded(run):
    jobs = read_jobs([run])
    seen = see("synthetic_1", jobs, 48)
    packed = json.loads(json.dumps(seen.packed({jobs[0]: 0})))
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["views"][0]["kept"]), dtype=np.uint8))
    assert bits[: len(seen.grid)].nonzero()[0].tolist() == seen.views[0].kept and not bits[len(seen.grid) :].any()
    heat = np.frombuffer(base64.b64decode(packed["heat"]), dtype=np.uint8) / 255 * packed["top"]
    np.testing.assert_allclose(heat, np.minimum(seen.views[0].heat, packed["top"]), atol=packed["top"] / 255)
    assert packed["grid"] == [seen.grid.frames, seen.grid.height, seen.grid.width, seen.grid.newline]
    assert all(frame.startswith("data:image/webp;base64,") for frame in packed["frames"])


def test_at_most_so_many_frames_are_shown_evenly(run):
    seen = see("synthetic_1", read_jobs([run]), 3)
    assert len(seen.frames) == len(seen.seconds) == 3
    assert seen.shown == [0, seen.grid.frames // 3, 2 * seen.grid.frames // 3]


def test_a_video_that_is_gone_or_another_is_said_and_the_answer_stays(run):
    config = OmegaConf.load(run / "config.yaml")
    for video, says in (("gone.mp4", "gone.mp4"), ("bbb_apple", "has it changed?")):
        config.video = video
        OmegaConf.save(config, run / "config.yaml")
        (job,) = read_jobs([run])
        seen = see(Path(video).stem, [job], 48)
        assert says in seen.problem and not seen.frames and seen.views[0].row["text"]


def test_a_sample_of_a_data_set_is_found_again(tmp_path):
    words = [
        "pruner=uniform",
        "dataset=synthetic",
        "dataset.scenes=2",
        "dataset.ask=question",
        f"hydra.run.dir={tmp_path / 'job'}",
    ]
    assert main([*words, *FAST]) == 0
    (job,) = read_jobs([tmp_path])
    seen = see("scene-0001", [job], 48)
    assert (seen.question, seen.answer) == (job.rows[1]["question"], job.rows[1]["answer"])
    assert seen.views[0].kept == job.rows[1]["kept"] and seen.views[0].heat.shape == (1024,) and not seen.problem
    config = OmegaConf.load(job.folder / "config.yaml")
    config.dataset.scenes = 1
    OmegaConf.save(config, job.folder / "config.yaml")
    assert "has no sample scene-0001 here" in see("scene-0001", read_jobs([tmp_path]), 48).problem


class Bytes:
    """A tokenizer of single bytes; 0 is special, and a dot where it shows."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(token or 46 for token in tokens if token or not skip_special_tokens).decode(errors="replace")


def test_a_character_of_several_tokens_belongs_to_its_last_one():
    euro = list("a€b".encode())
    assert spell(Bytes(), [], euro) == ["a", "", "", "€", "b"]
    assert spell(Bytes(), euro[:2], euro[2:]) == ["", "€", "b"] and spell(Bytes(), [], [0, 97]) == ["", "a"]


def test_rounds_part_guesses_from_the_targets_own_token_and_cuts():
    steps = [
        {"tokens": [97], "accepted": 0},
        {"tokens": [98, 99, 100], "accepted": 2, "refused": [120, 0]},
        {"tokens": [101, 0], "accepted": 4},  # a stop id among the guesses cut what followed
    ]
    assert rounds_of(steps, Bytes()) == [
        Round([], [], "a"),
        Round(["b", "c"], ["x", "."], "d"),
        Round(["e", ""], [], None),
    ]


def test_the_embedded_tokenizer_spells_its_own_answers():
    tokenizer = target_of("embedded:qwen2_5_vl/target", "hf").tokenizer
    tokens = tokenizer("a red circle appears, moves left and then disappears.")["input_ids"]
    assert "".join(spell(tokenizer, [], tokens)) == tokenizer.decode(tokens)
