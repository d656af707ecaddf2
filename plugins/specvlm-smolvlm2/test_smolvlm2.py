"""SmolVLM2: the contract, prompts and frames like Hugging Face's, and decodes like those of a pristine model."""

import json
from types import SimpleNamespace

import family_checks as checks
import family_folders
import packages
import pytest
import torch
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor, get_resize_output_image_size
from transformers.video_utils import VideoMetadata

from specvlm.engine.lean import why_not
from specvlm.errors import UserError
from specvlm.models.load import skeleton
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family
from specvlm.video.video import VideoInfo

FAMILY = "smolvlm"


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-smolvlm2"):
        yield


@pytest.mark.slow
def test_it_keeps_the_contract():
    assert check_family(checks.folder(FAMILY) / "target", checks.folder(FAMILY) / "small") == 7 * 14


def test_prompts_equal_those_of_hugging_faces_processor():
    """For videos of different lengths, it counts the black frames that pad the shorter one; ours counts real frames."""
    assert checks.unlike_the_processor(FAMILY) == (12 + 6, ["unlike videos: ids"])


def test_a_chat_with_a_video_has_the_processors_template_and_any_other_the_checkpoints():
    words = {
        request: checks.model(FAMILY).tokenizer.decode(checks.prompt(FAMILY, request).tokens) for request in ("image", "video")
    }
    assert "system" in words["image"] and "<end_of_utterance>" not in words["image"]
    assert "system" not in words["video"] and "<end_of_utterance>" in words["video"]


@pytest.mark.slow
def test_prompts_are_made_of_the_processors_inputs_alike():
    assert checks.unlike_from_inputs(FAMILY) == (12, [])


@pytest.mark.slow
def test_a_session_answers_messages_and_inputs_as_a_pristine_model():
    assert checks.session_answers(FAMILY) == [checks.answers(FAMILY)["interleaved"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_kind_of_request_is_decoded_as_by_a_pristine_model(every):
    assert checks.unequal_requests(FAMILY, every=every) == (12 * (7 if every else 2), [])


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_model(every):
    tried, wrong = checks.unequal_strategies(FAMILY, every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


@pytest.mark.slow
def test_its_language_model_runs_captured():
    assert why_not(checks.model(FAMILY)) is None
    found = checks.captured_answers(FAMILY)
    assert found == [found[0]] * 3


def test_recorded_attention_is_that_of_the_towers_last_layer():
    """Against Hugging Face's eager attention, token by token: a token is a square of patches."""
    lm, prompt = checks.model(FAMILY), checks.prompt(FAMILY, "video")
    sight, pristine, side, many = VisionProbe(), family_folders.smolvlm(), 2, 4
    lm.features(prompt, sight=sight)
    tower, weights = pristine.model.vision_model.eval(), []
    tower.load_state_dict(lm.hf.model.vision_model.state_dict())
    tower.set_attn_implementation("eager")
    tower.encoder.layers[-1].self_attn.register_forward_hook(lambda module, given, made: weights.append(made[1]))
    with torch.inference_mode():
        tower(prompt.videos[0]["pixels"])
    received_FP = weights[0].mean((1, 2))
    tokens_N = received_FP.unflatten(1, (side, many, side, many)).mean((2, 4)).flatten()
    assert torch.allclose(sight.attention(), tokens_N, atol=1e-6)


@pytest.mark.parametrize(("total", "fps"), [(300, 30000 / 1001), (90, 30.0), (3, 25.0), (9999, 23.976), (17, 2.0), (1, 8.0)])
@pytest.mark.parametrize(
    "sampling", [{"fps": 1, "max_frames": 64}, {"fps": 2.5, "max_frames": 9}, {"fps": 0.1, "max_frames": 3}]
)
def test_frames_are_those_of_hugging_faces_processor(tmp_path, monkeypatch, total, fps, sampling):
    lm = set_to(tmp_path, monkeypatch, video_sampling=sampling | {"video_size": {"longest_edge": 56}})
    asked = lm.sampling(VideoInfo(total, fps, 9, 9, total / fps))
    about = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    settings = {"num_frames": sampling["max_frames"], "fps": sampling["fps"]}
    want = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(**settings), about, **settings)
    assert asked["sampling"](total, asked["frames"]) == want.tolist() and asked["frames"] == len(want)


def set_to(folder, monkeypatch, **settings):
    """Return the model, unchanged but for settings of its video processor."""
    lm = type(checks.model(FAMILY))(checks.model(FAMILY).hf, checks.model(FAMILY).tokenizer, folder)
    found = json.loads((checks.model(FAMILY).folder / "preprocessor_config.json").read_text()) | settings
    (folder / "preprocessor_config.json").write_text(json.dumps(found))
    return lm


def test_frames_are_resized_to_the_processors_sizes():
    module = packages.module_of(next(folder for folder in packages.FOLDERS if folder.name == "specvlm-smolvlm2"))
    for height, width in torch.randint(1, 2000, (500, 2), generator=torch.Generator().manual_seed(0)).tolist():
        theirs = get_resize_output_image_size(torch.empty(height, width, device="meta"), 1536)
        assert module.longest_to(height, width, 1536) == tuple(theirs), (height, width)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_image_size": {"longest_edge": 64}}, "frames are 64x64 for the processor, 56x56 for the model"),
        ({"resample": 3}, "resample=3, which is not Lanczos"),
        ({"size": {"height": 9, "width": 9}}, "expected a longest_edge"),
        ({"video_sampling": {"fps": 0, "max_frames": 4}}, "expected numbers above 0"),
        ({"video_sampling": 7}, "video_sampling of the video processor is not an object of settings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, monkeypatch, settings, said):
    with pytest.raises(UserError, match=said):
        set_to(tmp_path, monkeypatch, **settings).check_settings()


def test_frames_of_one_size_have_no_limit_of_pixels():
    with pytest.raises(UserError, match="there is nothing to limit"):
        skeleton(checks.folder(FAMILY) / "target").process_video(checks.clip(2, 30, 30, 1.0), 9)
