"""The rows that the embedded pairs are trained on are laid out as the library's own prompts, pruned ones too."""

import pytest
import torch
from rounding import rounding

from experiments.embedded_pair import forward
from experiments.embedded_pair.layout import layout
from experiments.embedded_pair.models import build, save_folder
from experiments.embedded_pair.tokenizer import FAMILIES, build_tokenizer, encode, first_question
from specvlm.models.load import load, skeleton
from specvlm.types import Features, KeepSet
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
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (count, 3, synthetic.SIDE, synthetic.SIDE), generator=generator, dtype=torch.uint8)[::step]
    times = tuple(frame / synthetic.FPS for frame in range(0, count, step))
    return Clip(frames, times, synthetic.FPS / step, "noise", count, synthetic.FPS)


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


def rows_of(features):
    """The library's features as the training forward has them."""
    if not isinstance(features, Features):
        return features[None]
    return torch.cat([features.rows, features.added.flatten(1)], 1)[None]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_pruned_training_context_gives_the_logits_of_a_pruned_prompt(folders, family):
    lm, question = load(folders[family], "float64"), "describe the video ."
    prompt = lm.prompt(question, [clip_of(family, 4)])
    features = lm.features(prompt)
    total = len(prompt.video_index)
    kept = torch.tensor([0, 1, 63, 64, 130, total - 1])
    embeds, positions = lm.pruned(prompt, features, KeepSet(kept, total), "original")
    ids = torch.tensor(first_question(family, question))
    theirs = lm.head(lm.forward(embeds, positions, lm.new_cache(len(embeds)), None)[-len(ids) :])
    ours = forward.Forward(lm.hf, family).text(rows_of(features), ids[None], 4, keep=kept[None])[0]
    norms = [part for part in lm.hf.modules() if "Norm" in type(part).__name__]  # in float32 whatever the model's dtype
    weights = sum(norm.weight.numel() for norm in norms)
    assert (ours - theirs).abs().max() / theirs.abs().max() < rounding(weights, 1.0, torch.float32)
