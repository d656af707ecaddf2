"""The synthetic world, the sample clips, and the checkpoint folders of the embedded pairs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from covering import sampled
from rounding import rounding
from transformers import AutoModelForImageTextToText, AutoTokenizer

import specvlm
from experiments.embedded_pair import forward
from experiments.embedded_pair.evaluate import DRAFTS
from experiments.embedded_pair.keepsets import keep_set
from experiments.embedded_pair.models import build
from experiments.embedded_pair.tokenizer import encode, first_question
from specvlm.video import synthetic
from specvlm.video.preprocess import LlavaVideoConfig, Qwen3VideoConfig, QwenVideoConfig, llava_video, qwen_video
from specvlm.video.video import read_video

ASSETS = Path(specvlm.__file__).parent / "assets"
FACTS = json.loads((ASSETS / "clips" / "synthetic.json").read_text())
SENTENCE = re.compile(
    r"at second \w+ a \w+ \w+ \w+ appears at the \w+ \w+ , "
    r"(stays there|turns \w+|moves (up|down|left|right)( left| right)? to the \w+ \w+)"
    r" and (then disappears|remains until the end) \."
)


@pytest.mark.slow
def test_a_seed_gives_the_same_scene_questions_and_pixels():
    one, two = synthetic.sample_scene(7), synthetic.sample_scene(7)
    assert one == two != synthetic.sample_scene(8)
    assert synthetic.questions(one, 3) == synthetic.questions(two, 3) != synthetic.questions(one, 4)
    assert np.array_equal(synthetic.render(one, 5), synthetic.render(two, 5))
    assert not np.array_equal(synthetic.render(one, 5), synthetic.render(one, 6))


def test_the_world_is_the_one_that_the_models_were_trained_on():
    """The weights depend on scenes, words and their ids: a changed sampler or vocabulary makes them useless."""
    assert synthetic.caption(synthetic.sample_scene(101, min_objects=2)) == FACTS["synthetic_1.mp4"]["caption"]
    assert len(synthetic.VOCABULARY) == len(set(synthetic.VOCABULARY)) == 130


def test_captions_follow_the_grammar_and_tell_every_object():
    for seed in range(300):
        scene = synthetic.sample_scene(seed)
        text = synthetic.caption(scene)
        assert len(list(SENTENCE.finditer(text))) == len(scene.things)
        assert text.startswith(synthetic.NUMBERS[len(scene.things)])
        answers = [part for pair in synthetic.questions(scene, seed) for part in pair]
        assert set(" ".join([text, *answers]).split()) <= set(synthetic.VOCABULARY)


def test_objects_have_colours_of_their_own_and_never_share_a_place():
    for seed in range(300):
        scene = synthetic.sample_scene(seed, seconds=4 + seed % 13)
        colors = [c for t in scene.things for c in (t.color, t.turn) if c is not None]
        assert len(colors) == len(set(colors))
        for i, late in enumerate(scene.things):
            assert 0 <= late.second < late.end <= scene.seconds
            for early in scene.things[:i]:
                assert late.second > early.second
                if late.second < early.end:
                    assert not {late.start, late.stop} & {early.start, early.stop}


def test_render_gives_uint8_frames_at_two_a_second():
    video = synthetic.render(synthetic.sample_scene(1, seconds=5))
    assert video.shape == (10, 224, 224, 3)
    assert video.dtype == np.uint8


def test_an_object_is_drawn_where_and_when_its_caption_says():
    scene = synthetic.sample_scene(11, min_objects=2)
    video = synthetic.render(scene).astype(float)
    for thing in scene.things:
        y = int(224 / 6 + thing.start // 3 * 224 / 3 + thing.jitter[1])
        x = int(224 / 6 + thing.start % 3 * 224 / 3 + thing.jitter[0])
        box = slice(y - 8, y + 8), slice(x - 8, x + 8)
        color = np.array(synthetic.COLORS[synthetic.COLOR_NAMES[thing.color]])
        nearest = np.abs(video[:, *box] - color).sum(-1).min((1, 2))  # to the object's colour, a frame
        assert nearest[2 * thing.second] < 40
        assert thing.second == 0 or nearest[2 * thing.second - 1] > 60


@pytest.mark.parametrize("seconds", [2, 17])
def test_a_length_that_no_scene_has_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds}"):
        synthetic.sample_scene(0, seconds=seconds)


def test_assets_stay_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 40_000_000
    for family, drafts in DRAFTS.items():
        for draft in drafts:
            assert (ASSETS / family / draft / "model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("family", DRAFTS)
def test_checkpoints_of_a_family_share_one_tokenizer_that_reads_and_writes_plain_text(family):
    tokenizers = [AutoTokenizer.from_pretrained(ASSETS / family / role) for role in ("target", *DRAFTS[family])]
    assert len({json.dumps(t.get_vocab(), sort_keys=True) for t in tokenizers}) == 1
    tokenizer = tokenizers[0]
    assert tokenizer("Describe the video.").input_ids == tokenizer("describe the video .").input_ids
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id
    text = "at the end the scene is empty."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


MISSED = {("qwen3_vl", "synthetic_1.mp4")}  # this target, exact on 126 of 128 other scenes, counts an object twice


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), sampled(list(FACTS), list(DRAFTS)))
def test_the_target_captions_the_clips_exactly(family, name):
    folder = ASSETS / family / "target"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    inputs = _inputs(family, tokenizer, ASSETS / "clips" / name, "Describe the video.")
    answer = model.generate(**inputs, max_new_tokens=160)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert (answer[:-1].tolist() == tokenizer(FACTS[name]["caption"]).input_ids) == ((family, name) not in MISSED)


@pytest.mark.parametrize("family", DRAFTS)
def test_the_training_forward_gives_the_logits_of_the_stock_one(family):
    scene, step = synthetic.sample_scene(3, seconds=4), 2 if family == "llava_onevision" else 1
    objects, backgrounds = map(torch.from_numpy, synthetic.pack([scene]))
    frames = synthetic.draw(objects, backgrounds, torch.arange(0, 8, step).float())[0]
    ids = torch.tensor(first_question(family, "describe the video .") + encode(synthetic.caption(scene)))
    net = forward.Forward(build(family, "draft").double().eval(), family)
    parity = forward.parity(net, forward.patches(frames, family, torch.float64), 4, ids)  # relative to the largest logit
    norms = [part for part in net.model.modules() if "Norm" in type(part).__name__]  # in float32 whatever the model's dtype
    assert parity < rounding(sum(norm.weight.numel() for norm in norms), 1.0, torch.float32)


def test_training_keep_sets_are_those_of_the_pruner():
    attention = torch.rand(4, 65, generator=torch.Generator().manual_seed(0)) ** torch.tensor([[1.0], [4], [16], [64]])
    kept = keep_set("two_stage", attention, 13)
    for row, index in zip(attention, kept, strict=True):
        value, order = row.sort(descending=True)
        first = min(int((value.cumsum(0) < 0.4 * value.sum()).sum()) + 1, 13)
        rest = order[first:].sort().values
        spread = [rest[i * (len(rest) - 1) // max(1, 12 - first)].item() for i in range(13 - first)]
        assert index.tolist() == sorted(order[:first].tolist() + spread)


def _inputs(family, tokenizer, path, question):
    """Make the stock model's inputs: the chat template with its placeholder expanded, and the pixels."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    folder = ASSETS / family / "target"
    if family in ("qwen2_5_vl", "qwen3_vl"):
        config = QwenVideoConfig if family == "qwen2_5_vl" else Qwen3VideoConfig
        pixels, grid = qwen_video(read_video(path, fps=2).frames, config.from_folder(folder))
        placeholder, count = "<|video_pad|>", 1024 if family == "qwen2_5_vl" else 64
        extra = {"video_grid_thw": torch.tensor([grid])}
        if family == "qwen2_5_vl":
            extra["second_per_grid_ts"] = torch.tensor([1.0])
        else:
            frame = f"<|vision_start|>{placeholder}<|vision_end|>"
            text = text.replace(placeholder, "".join(f"<{second}.2 seconds>{frame}" for second in range(16)))
    else:
        pixels = llava_video(read_video(path, fps=1).frames, LlavaVideoConfig.from_folder(folder))
        pixels = pixels if pixels.ndim == 5 else pixels[None]
        placeholder, count, extra = "<video>", 1025, {}
    ids = tokenizer(text.replace(placeholder, placeholder * count), return_tensors="pt").input_ids
    if family != "llava_onevision":
        extra["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(placeholder)).int() * 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels.float(), **extra}
