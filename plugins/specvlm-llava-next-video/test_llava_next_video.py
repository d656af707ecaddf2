"""LLaVA-NeXT-Video: the contract, prompts and frames like Hugging Face's, decodes like those of an unmodified model."""

import json

import family_checks as checks
import family_folders
import packages
import pytest
import torch

from specvlm.engine.lean import why_not
from specvlm.errors import UserError
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family

FAMILY = "llava_next_video"


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-llava-next-video"):
        yield


@pytest.mark.slow
def test_it_keeps_the_contract():
    assert check_family(checks.folder(FAMILY) / "target", checks.folder(FAMILY) / "small") == 7 * 14


def test_prompts_equal_those_of_hugging_faces_processor():
    assert checks.unlike_the_processor(FAMILY) == (11 + 5, [])


@pytest.mark.slow
def test_prompts_are_made_of_the_processors_inputs_alike():
    """It makes none of videos of unlike lengths."""
    assert checks.unlike_from_inputs(FAMILY) == (12, ["unlike videos"])


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


@pytest.mark.parametrize(("size", "layer"), [(56, -2), (70, -1), (84, 2)])
def test_recorded_attention_is_that_of_the_last_layer_whose_output_is_used(monkeypatch, size, layer):
    """Against Hugging Face's eager attention. A token is a square of patches; those of an odd row are left out."""
    hf = family_folders.llava_next_video()
    hf.config.vision_config.image_size, hf.config.vision_feature_layer = size, layer
    hf = type(hf)(hf.config).eval()
    lm, pixels = type(checks.model(FAMILY))(hf), torch.randn(2, 3, size, size)
    hf.model.vision_tower.set_attn_implementation("eager")
    sight, weights, grid = VisionProbe(), [], lm.grid(2)
    used = hf.model.vision_tower.encoder.layers[{-2: 1, -1: 2, 2: 1}[layer]].self_attn
    handle = used.register_forward_hook(lambda module, given, made: weights.append(made[1]))
    with torch.inference_mode():
        features = lm.encode_video(grid, {"pixels": pixels}, None, sight)
    handle.remove()
    side = size // 14
    received_FHW = weights[0].mean((1, 2))[:, 1:].unflatten(1, (side, side))
    cells = received_FHW[:, : grid.height * 2, : grid.width * 2].unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
    assert len(features) == len(grid) and torch.allclose(sight.attention(), cells.flatten(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crop_size": {"height": 42, "width": 42}}, "frames are 42x42 for the processor, 56x56 for the model"),
        ({"crop_size": {"height": 56, "width": 42}}, "expected a shortest_edge, and a square crop that is no larger"),
        ({"size": {"shortest_edge": 40}}, "expected a shortest_edge, and a square crop that is no larger"),
        ({"size": {"height": 56, "width": 56}}, "expected a shortest_edge"),
        ({"do_center_crop": False}, "expected a shortest_edge, and a square crop"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, said):
    lm = type(checks.model(FAMILY))(checks.model(FAMILY).hf, checks.model(FAMILY).tokenizer, tmp_path)
    found = json.loads((checks.model(FAMILY).folder / "video_preprocessor_config.json").read_text()) | settings
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=said):
        lm.check_settings()
