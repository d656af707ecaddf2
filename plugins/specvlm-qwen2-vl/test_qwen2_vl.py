"""Qwen2-VL: the contract, prompts like Hugging Face's, and decodes like those of a pristine model."""

import family_checks as checks
import packages
import pytest

from specvlm.testing import check_family

FAMILY = "qwen2_vl"


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-qwen2-vl"):
        yield


@pytest.mark.slow
def test_it_keeps_the_contract():
    assert check_family(checks.folder(FAMILY) / "target", checks.folder(FAMILY) / "small") == 7 * 14


@pytest.mark.slow
def test_prompts_equal_those_of_hugging_faces_processor():
    assert checks.unlike_the_processor(FAMILY) == (10 + 12 + 4, [])


@pytest.mark.slow
def test_prompts_are_made_of_the_processors_inputs_alike():
    assert checks.unlike_from_inputs(FAMILY) == (10, [])


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
