"""InternVL: the contract, prompts like Hugging Face's, and decodes like those of a pristine model."""

import family_checks as checks
import family_folders
import packages
import pytest
import torch

from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family

FAMILY = "internvl"


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-internvl"):
        yield


@pytest.mark.slow
def test_it_keeps_the_contract():
    assert check_family(checks.folder(FAMILY) / "target", checks.folder(FAMILY) / "small") == 7 * 14


@pytest.mark.slow
def test_prompts_equal_those_of_hugging_faces_processor():
    assert checks.unlike_the_processor(FAMILY) == (10 + 4, [])


@pytest.mark.slow
def test_prompts_are_made_of_the_processors_inputs_alike():
    # The tiny tokenizer has no word for "firstFrame1": without its first number, a video is read as images.
    assert checks.unlike_from_inputs(FAMILY) == (10, ["interleaved"])


@pytest.mark.slow
def test_a_session_answers_messages_and_inputs_as_a_pristine_model():
    assert checks.session_answers(FAMILY) == [checks.answers(FAMILY)["interleaved"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_kind_of_request_is_decoded_as_by_a_pristine_model(every):
    assert checks.unequal_requests(FAMILY, every=every) == (10 * (7 if every else 2), [])


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_model(every):
    tried, wrong = checks.unequal_strategies(FAMILY, every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


def test_recorded_attention_is_that_of_the_towers_last_layer():
    """Against Hugging Face's eager attention, token by token: a token is a square of 2 x 2 patches."""
    lm, request = checks.model(FAMILY), checks.prompt(FAMILY, "video")
    sight, pristine = VisionProbe(), family_folders.internvl()
    lm.features(request, sight=sight)
    tower = pristine.model.vision_tower
    tower.load_state_dict(lm.hf.model.vision_tower.state_dict())
    tower.set_attn_implementation("eager")
    weights_FHRR = tower.eval()(request.videos[0]["pixels"], output_attentions=True).attentions[-1]
    received_F44 = weights_FHRR.mean((1, 2))[:, 1:].unflatten(1, (4, 4))
    cells = [received_F44[f, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for f in range(6) for y in (0, 1) for x in (0, 1)]
    assert torch.allclose(sight.attention(), torch.stack(cells), atol=1e-6)
