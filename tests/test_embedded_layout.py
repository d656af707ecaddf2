"""The rows that the embedded pairs are trained on are laid out as the library's own prompts."""

import pytest
import torch

from experiments.embedded_pair.layout import layout
from experiments.embedded_pair.models import build, save_folder
from experiments.embedded_pair.tokenizer import FAMILIES, build_tokenizer, encode, first_question
from specvlm.models.load import skeleton
from specvlm.video import synthetic
from specvlm.video.video import Clip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        save_folder(build(family, "draft"), family, folder)
    return found


def clip_of(family, seconds):
    count, step = synthetic.FPS * seconds, 2 if family == "llava_onevision" else 1
    frames = torch.zeros(count, 3, synthetic.SIDE, synthetic.SIDE, dtype=torch.uint8)[::step]
    times = tuple(frame / synthetic.FPS for frame in range(0, count, step))
    return Clip(frames, times, synthetic.FPS / step, "black", count, synthetic.FPS)


@pytest.mark.parametrize("seconds", [4, 12, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_have_the_tokens_and_positions_of_a_prompt(folders, family, seconds):
    lm, question = skeleton(folders[family]), "describe the video ."
    prompt = lm.prompt(question, [clip_of(family, seconds)])
    where, asked = layout(family, seconds), first_question(family, question)
    assert prompt.tokens.tolist() == where.tokens.tolist() + asked
    assert prompt.video_index.tolist() == where.slots.tolist()
    assert prompt.cut == len(where.tokens)
    assert lm.positions(prompt).tolist() == where.places[:, : len(prompt)].tolist()


def test_timestamps_are_tokens_of_qwen3_vl_alone():
    stamp = "<10.2 seconds><|vision_start|>"
    ids = build_tokenizer("qwen3_vl")(stamp).input_ids
    assert ids == encode("< 1 0 . 2 seconds > <|vision_start|>")
    for family in ("qwen2_5_vl", "llava_onevision"):
        tokenizer = build_tokenizer(family)
        assert len(tokenizer) == len(synthetic.VOCABULARY)
        assert tokenizer(stamp).input_ids.count(tokenizer.unk_token_id) == 5
