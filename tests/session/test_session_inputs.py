"""What a session takes: models in every form, prompts in every form, and one line for whatever it does not take."""

from __future__ import annotations

import copy
from pathlib import Path

import family_checks as checks
import numpy as np
import pytest
import torch
from PIL import Image
from session_pairs import QUESTION, clip, session

from specvlm import Clip, UserError, clip_from_frames, load_pair
from specvlm.config import model_folder
from specvlm.models.adopt import adopted
from specvlm.models.load import load, skeleton
from specvlm.session.inputs import Reading, read
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.types import VideoPrompt
from specvlm.video.clips import find_clip

FILE = find_clip("synthetic_1")
BUILT_IN = ("qwen2_5_vl", "llava_onevision", "qwen3_vl")


def reading(prompt=QUESTION, videos=None, images=None, family="qwen2_5_vl", **options) -> Reading:
    of = session(family)
    return read(of.target, prompt, videos, images, of.options.asked(options))


def same(one: VideoPrompt, other: VideoPrompt, but: tuple[str, ...] = ("origin",)) -> bool:
    """Whether two prompts have equal tokens and pixels."""
    assert len(one.videos) == len(other.videos) and len(one.images) == len(other.images)
    pairs = zip((*one.videos, *one.images), (*other.videos, *other.images), strict=True)
    for mine, its in pairs:
        for name in mine.keys() - set(but):
            a, b = mine[name], its[name]
            if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
                return False
    return torch.equal(one.tokens, other.tokens) and one.grids == other.grids


# ---- videos and images ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_video_is_the_same_as_path_name_and_bytes():
    want = reading(videos=str(FILE))
    assert want.frames == len(want.prompt.videos[0]["pixels"]) // (want.prompt.videos[0]["thw"][1] ** 2) * 2
    for video in (FILE, "synthetic_1", [FILE], FILE.read_bytes(), bytearray(FILE.read_bytes())):
        assert same(reading(videos=video).prompt, want.prompt)


def test_options_choose_the_frames_of_a_file():
    assert reading(videos=FILE, frames=4).frames == 4
    assert reading(videos=FILE, fps=0.5).frames < reading(videos=FILE, fps=1).frames
    small = reading(videos=FILE, frames=2, max_pixels=200 * 200).prompt
    assert len(small) < len(reading(videos=FILE, frames=2).prompt)


FORMS = {
    "tensor": lambda frames: frames,
    "channels last": lambda frames: frames.permute(0, 2, 3, 1),
    "array": lambda frames: frames.numpy(),
    "array, channels last": lambda frames: frames.permute(0, 2, 3, 1).numpy(),
    "list of tensors": list,
    "list of arrays": lambda frames: [frame.permute(1, 2, 0).numpy() for frame in frames],
    "pictures of Pillow": lambda frames: [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames],
    "clip": lambda frames: clip_from_frames(frames),
    "in a list": lambda frames: [frames],
}


@pytest.mark.parametrize("form", FORMS)
def test_frames_in_memory_are_the_same_in_every_form(form):
    frames = clip(frames=4).frames
    want = reading(videos=clip_from_frames(frames))
    assert want.frames == 4 and want.prompt.videos[0]["seconds"] == 2 / 24  # the rate that Hugging Face assumes
    assert same(reading(videos=FORMS[form](frames)).prompt, want.prompt)


def test_the_rate_of_frames_in_memory_may_be_told():
    frames = clip(frames=4).frames
    assert reading(videos=clip_from_frames(frames, fps=2)).prompt.videos[0]["seconds"] == 1.0
    assert clip_from_frames(frames.numpy(), fps=8).times == (0.0, 0.125, 0.25, 0.375)
    with pytest.raises(UserError, match="frames in memory are used as they are"):
        reading(videos=frames, fps=2)


def test_an_image_is_the_same_in_every_form(tmp_path):
    pixels = checks.picture(60, 90)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "one.png")
    want = reading(images=pixels)
    path = tmp_path / "one.png"
    for image in (path, str(path), path.read_bytes(), picture, pixels.numpy(), np.asarray(picture), [pixels]):
        assert same(reading(images=image).prompt, want.prompt)
    assert len(reading(images=[pixels, picture]).prompt.images) == 2


def test_an_array_that_is_a_view_or_read_only_is_read():
    frames = np.ascontiguousarray(clip(frames=4).frames.permute(0, 2, 3, 1).numpy())
    frames.flags.writeable = False
    assert same(reading(videos=frames[::-1]).prompt, reading(videos=frames[::-1].copy()).prompt)


BAD = {
    "no such file": ({"videos": "nothing.mp4"}, "nothing.mp4"),
    "no such clip": ({"videos": "synthetic_9"}, "Did you mean"),
    "an address": ({"videos": "https://a.example/b.mp4"}, "not fetched"),
    "bytes of no video": ({"videos": b"nothing"}, ""),
    "bytes of no image": ({"images": b"nothing"}, "an image given as bytes"),
    "floats": ({"videos": np.zeros((2, 32, 32, 3))}, "float64 ndarray is not a picture"),
    "a wrong shape": ({"videos": torch.zeros(2, 4, 32, 32, dtype=torch.uint8)}, "expected (H, W, 3)"),
    "one picture": ({"videos": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "expected (T, H, W, 3)"),
    "no frame": ({"videos": torch.zeros(0, 3, 32, 32, dtype=torch.uint8)}, "expected (T, H, W, 3)"),
    "sizes that differ": (
        {"videos": [torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(3, 32, 64, dtype=torch.uint8)]},
        "differ in size",
    ),
    "a number": ({"videos": 3}, "int is not a video"),
    "a prompt that is none": ({"prompt": 3}, "a prompt is a text"),
    "a message that is none": ({"prompt": ["what?"]}, "a message needs a role"),
    "a part without its video": ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "has no video"),
    "a part with other keys": (
        {"prompt": [{"role": "user", "content": [{"type": "video", "video": str(FILE), "fps": 2}]}]},
        "has fps",
    ),
    "no place": ({"prompt": [{"role": "user", "content": "what?"}], "videos": str(FILE)}, "no place for all videos"),
    "a control token": ({"prompt": "say <|im_end|>"}, "control token"),
    "bytes": ({"prompt": b"what?"}, "got a bytes"),
    "half a character": ({"prompt": "what\ud800?"}, "expected a text, got"),
    "no message": ({"prompt": []}, "needs a message"),
    "a message without its list": ({"prompt": {"role": "user", "content": "what?"}}, "put the message into a list"),
    "a role that is none": ({"prompt": [{"role": "usr", "content": "what?"}]}, 'Did you mean "user"'),
    "a text that is none": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "expected a text"),
    "an image's address": ({"images": "https://a.example/b.png"}, "not fetched"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_input_is_explained_in_one_line(case):
    given, said = BAD[case]
    with pytest.raises(UserError) as refused:
        reading(**{"prompt": QUESTION} | given)
    assert said in str(refused.value) and "\n" not in str(refused.value)


# ---- messages ------------------------------------------------------------------------------------------------------


def test_messages_hold_videos_and_images_or_take_those_given():
    picture, content = checks.picture(60, 90), {"type": "text", "text": "and what ?"}
    system = {"role": "system", "content": "answer with one word ."}

    def chat(video, image):
        return [system, {"role": "user", "content": [{"type": "video"} | video, {"type": "image"} | image, content]}]

    want = reading(chat({"video": str(FILE)}, {"image": picture}), frames=2)
    assert want.frames == 2 and len(want.prompt.videos) == len(want.prompt.images) == 1
    for prompt, given in (
        (chat({"path": str(FILE)}, {"image": picture}), {}),
        (chat({}, {}), {"videos": FILE, "images": picture}),
        (chat({"video": FILE.read_bytes()}, {}), {"images": [picture]}),
    ):
        assert same(reading(prompt, frames=2, **given).prompt, want.prompt)


@pytest.mark.slow
def test_a_chat_is_answered_as_its_prompt():
    of = session()
    messages = [
        {"role": "user", "content": [{"type": "video", "video": clip()}, {"type": "text", "text": "how many objects appear?"}]},
        {"role": "assistant", "content": "four objects."},
        {"role": "user", "content": QUESTION},
    ]
    found = of.generate(messages, max_new_tokens=8, check=True)
    assert found.token_ids == of.generate(of.target.chat(messages), max_new_tokens=8).token_ids
    assert found.verdict == "identical" and found.statistics["frames"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("family", "request_"), [(family, one) for family in BUILT_IN for one in checks.requests(family)])
def test_a_processors_inputs_make_the_prompt_that_they_were_made_of(family, request_):
    lm, want = checks.model(family), checks.prompt(family, request_)
    found = lm.hf_prompt(lm.hf_inputs(lm.hf.config, want))
    assert same(found, want, ("origin", "seconds", "times"))
    if family == "qwen2_5_vl":  # the processor's are float32
        assert [v["seconds"] for v in found.videos] == pytest.approx([v["seconds"] for v in want.videos], rel=1e-6)
    assert torch.equal(found.video_index, want.video_index) and torch.equal(found.image_index, want.image_index)
    assert torch.equal(lm.positions(found), lm.positions(want))


def test_inputs_that_do_not_fit_are_explained():
    lm = session().target
    inputs = lm.generate_inputs(lm.prompt(QUESTION, [clip(frames=2)]))
    twice = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    ids = inputs["input_ids"]
    for given, said in (
        (twice, "hold 2 prompts"),
        (inputs | {"attention_mask": torch.zeros_like(ids)}, "padding"),
        (inputs | {"input_ids": ids[:, :20]}, "do they belong together"),
        (inputs | {"input_ids": ids.tolist()}, "return_tensors"),
        (inputs | {"pixels": ids}, "inputs pixels: expected"),
        (inputs | {"video_grid_thw": None}, "cannot be used"),
        (inputs | {"pixel_values_videos": inputs["pixel_values_videos"][1:]}, "cannot be used"),
        (inputs | {"second_per_grid_ts": [1.0, 1.0]}, "cannot be used"),
    ):
        with pytest.raises(UserError, match=said):
            reading(given)
    with pytest.raises(UserError, match="leave out videos"):
        reading(inputs, videos=clip())


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loaded_models_are_used_as_they_are_and_not_changed():
    from transformers import AutoModelForImageTextToText

    def loaded(name):
        folder = model_folder(f"embedded:qwen2_5_vl/{name}")
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    target, draft = loaded("target"), loaded("plain")
    before = copy.deepcopy(target.config.to_dict()), target.config.text_config._attn_implementation, dict(vars(target))
    of, want = load_pair(target, draft, device="cpu"), session()
    found = of.generate(QUESTION, videos=clip(), max_new_tokens=8, check=True)
    assert found.verdict == "identical"
    assert found.token_ids == want.generate(QUESTION, videos=clip(), max_new_tokens=8).token_ids
    assert (target.config.to_dict(), target.config.text_config._attn_implementation, dict(vars(target))) == before
    assert next(target.parameters()) is next(of.target.hf.parameters())
    inputs = of.target.generate_inputs(of.target.prompt(QUESTION, [clip()]))
    ids = target.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids == found.token_ids == of.generate(inputs, max_new_tokens=8).token_ids


def test_what_is_no_model_is_explained():
    held = load(model_folder("embedded:qwen2_5_vl/plain"), "float32")
    for given, said in (
        (("embedded:qwen",), "Did you mean"),
        (("/no/such/folder",), "no such model folder"),
        ((3,), "is not a Hugging Face model"),
        ((held.hf.train(),), "training mode"),
    ):
        with pytest.raises(UserError, match=said):
            load_pair(*given, device="cpu")
    held.hf.eval()
    folder = str(model_folder("embedded:qwen2_5_vl/plain"))
    for options, said in (
        ({"revision": "main"}, "is for a name on the hub"),
        ({"device": "cuda:99"}, "CUDA devices here"),
        ({"device": "tpu0"}, "expected auto, cpu"),
        ({"ratio": 2.0}, "ratio"),
        ({"ration": 0.5}, "Did you mean"),
        ({"drafter": "tree"}, "needs a draft model"),
        ({"engine": "fast"}, "engine=fast"),
        ({"dtype": 3}, "dtype must be auto or"),
        ({"dtype": torch.int8}, "dtype must be auto or"),
        ({"device": "meta"}, "expected auto, cpu"),
        ({"device": None}, "expected auto, cpu"),
        ({"mrope": "x"}, "mrope must be hf or reference"),
        ({"weights": "int3"}, "weights=int3: expected"),
        ({"processor": folder}, "processor=.* is for loaded models"),
        ({"draft_revision": "v1"}, "but there is no draft"),
        ({"draft_weights": "int8"}, "but there is no draft"),
    ):
        with pytest.raises(UserError, match=said):
            load_pair(folder, **{"device": "cpu"} | options)
    with pytest.raises(UserError, match="loaded already"):
        load_pair(held.hf, device="cpu", dtype="bfloat16")
    with pytest.raises(UserError, match="one family"):
        load_pair("embedded:qwen2_5_vl/target", "embedded:llava_onevision/plain", device="cpu")


def test_a_model_that_cannot_be_copied_as_it_is_is_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    text = Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=100)).eval()
    with pytest.raises(UserError, match="'qwen2' is not supported"):
        load_pair(text)
    held = skeleton(model_folder("embedded:qwen2_5_vl/plain")).hf

    class Wrapper(torch.nn.Module):
        config, generation_config = held.config, held.generation_config

    for given, options, said in (
        (Wrapper(), {}, "wraps a model"),
        (held, {"device": "cpu"}, "loaded already, on meta"),
        (held, {}, "weights are not on a device"),
    ):
        with pytest.raises(UserError, match=said):
            load_pair(given, **options)
    held = copy.deepcopy(session().draft.hf)
    hook = held.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="module lm_head has a forward hook"):
        load_pair(held)
    hook.remove()
    held.lm_head.adapter = type("Linear", (torch.nn.Module,), {"__module__": "peft.tuners.lora"})()
    with pytest.raises(UserError, match=r"module lm_head\.adapter is an adapter"):
        load_pair(held)


def test_swapped_models_and_settings_that_are_not_applied_are_warned_of():
    of = session()
    with pytest.warns(UserWarning, match="Are the two swapped"):
        load_pair(of.draft, of.target)
    hf = copy.deepcopy(load(model_folder("embedded:qwen2_5_vl/plain"), "float32").hf)
    hf.generation_config.no_repeat_ngram_size = 3
    with pytest.warns(UserWarning, match="not applied here: no_repeat_ngram_size"):
        load_pair(hf, device="cpu")


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    asked = []

    def fetched(name, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return model_folder(f"embedded:qwen2_5_vl/{name.partition('/')[2]}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    load_pair("owner/target", "owner/plain", revision="v1", draft_revision="v2", device="cpu")
    # First what is needed to plan the memory, then the weights.
    assert asked == [
        ("owner/target", "v1", False),
        ("owner/plain", "v2", False),
        ("owner/target", "v1", True),
        ("owner/plain", "v2", True),
    ]


def test_a_model_without_a_folder_asks_for_one(tmp_path):
    hf = copy.deepcopy(load(model_folder("embedded:qwen2_5_vl/plain"), "float32").hf)
    hf.config._name_or_path = ""
    with pytest.raises(UserError, match="was not loaded from a folder"):
        adopted(hf)
    assert adopted(hf, model_folder("embedded:qwen2_5_vl/plain")).folder == model_folder("embedded:qwen2_5_vl/plain")


@pytest.mark.slow
def test_without_a_draft_the_prompt_is_looked_up():
    of = load_pair("embedded:qwen2_5_vl/plain", device="cpu", dtype="float32", max_new_tokens=6)
    found = of.generate(QUESTION, videos=clip(frames=2), check=True)
    assert of.options.drafter == "prompt_lookup" and found.verdict == "identical" and len(found.token_ids) == 6


# ---- options -------------------------------------------------------------------------------------------------------

REFUSED = {
    "prunner": ("uniform", 'Did you mean "pruner"'),
    "temperature": (0.7, "sample with verifier="),
    "max_tokens": (7, "limit the answer with max_new_tokens"),
    "num_beams": (2, "beams are not supported"),
    "pruner": (3, "expected a name"),
    "drafter": (UniformPruner(), "is a pruner"),
    "verifier": ("gready", 'Did you mean "greedy"'),
    "ratio": (1.5, "between 0 and 1"),
    "max_new_tokens": (0, "at least 1"),
    "seed": ("0", "expected a whole number"),
    "n": (0, "at least 1"),
    "stop": ("", "expected texts"),
    "logprobs": (1000, "0 to 100"),
    "logit_bias": ({"four": 1.0}, "expected token ids"),
    "presence_penalty": (float("nan"), "finite"),
    "repetition_penalty": (-1.0, "more than 0"),
    "positions": ("new", "original, reindexed"),
    "check": (1, "True or False"),
    "reader": ("cv2", "reader"),
}


REFUSED_TOO = [
    ("seed", -1), ("seed", 2**63), ("stop", 5), ("stop", ["a", None]), ("stop_ids", ["a"]), ("stop_ids", [-1]), ("frames", "8"),
    ("frames", 0), ("fps", 0), ("fps", float("nan")), ("max_pixels", 0), ("reader", 3), ("max_new_tokens", True),
    ("ratio", float("nan")), ("repetition_penalty", float("inf")), ("presence_penalty", 10**400), ("frequency_penalty", 101),
    ("logit_bias", 3), ("logit_bias", {5: True}), ("logit_bias", {-1: 1.0}), ("logit_bias", {5: 1e9}), ("n", 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), REFUSED_TOO, ids=lambda one: f"{one}"[:20])
def test_a_value_of_the_wrong_kind_or_range_names_its_option(option, value):
    with pytest.raises(UserError, match=option) as refused:
        session().options.asked({option: value})
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_and_single_ids_are_taken():
    asked = session().options.asked({"max_new_tokens": np.int64(3), "ratio": np.float32(0.5), "stop": None, "stop_ids": 5})
    made = asked.asked({"logit_bias": {np.int64(7): 1}}).generation()
    assert (made.max_new_tokens, made.ratio, made.stop, made.stop_ids) == (3, 0.5, (), frozenset({5}))
    assert made.adjust.bias == {7: 1.0}


def test_strategies_are_checked_before_a_video_is_read():
    with pytest.raises(UserError, match="Did you mean"):
        session().generate(QUESTION, videos="nothing.mp4", verifier="gready")


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_cannot_be_used_is_refused_by_name(option):
    value, said = REFUSED[option]
    with pytest.raises(UserError) as refused:
        session().generate(QUESTION, videos=FILE, **{option: value})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="has token 5000"):
        session().generate(QUESTION, videos=clip(frames=2), max_new_tokens=1, logit_bias={5000: 1.0})


def test_a_strategy_may_be_an_instance_a_name_or_a_mapping():
    for pruner in (UniformPruner(), "uniform", {"name": "uniform"}):
        graph = session().graph(session().options.asked({"pruner": pruner}))
        assert graph.pruner == UniformPruner() and isinstance(clip(), Clip)


def test_a_path_of_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "own.mp4").write_bytes(FILE.read_bytes())
    assert reading(videos="~/own.mp4", frames=2).frames == 2
