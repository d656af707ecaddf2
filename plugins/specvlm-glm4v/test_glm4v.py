"""GLM-4.1V to 4.6V: the contract, prompts and frames like Hugging Face's, decodes like those of an unmodified model."""

import ast
from pathlib import Path
from types import SimpleNamespace

import family_checks as checks
import numpy as np
import packages
import pytest
import torch
import transformers
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.video_utils import VideoMetadata

from specvlm.engine.lean import why_not
from specvlm.errors import UserError
from specvlm.models.load import check_pair
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family
from specvlm.video.video import VideoInfo

FAMILIES = ("glm4v", "glm4v_moe", "glm46v")
# Our inputs of a prompt with both are images alone: transformers' model refuses the processor's.
BOTH = [f"{request}: {kind}_grid_thw" for request in ("mixed", "interleaved", "earlier turns") for kind in ("video", "image")]


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-glm4v"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe", pytest.param("glm46v", marks=pytest.mark.exhaustive)])
def test_it_keeps_the_contract(family):
    """For glm46v, see also the test of older classes' drafts."""
    assert check_family(checks.folder(family) / "target", checks.folder(family) / "small") == 7 * 14


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_equal_those_of_hugging_faces_processor(family):
    assert checks.unlike_the_processor(family) == (10 + 12 + 4, BOTH)


@pytest.mark.parametrize(("family", "time"), [("glm4v", "1"), ("glm4v_moe", "1.0 seconds")])
def test_times_are_written_as_the_processor_of_the_settings_does(family, time):
    lm, prompt = checks.model(family), checks.prompt(family, "video")
    assert f"<|end_of_image|>{time}<|begin_of_image|>" in lm.spell_video(prompt.grids[0], prompt.videos[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_made_of_the_processors_inputs_alike(family):
    assert checks.unlike_from_inputs(family) == (10, [])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"])
def test_a_session_answers_messages_and_inputs_as_a_pristine_model(family):
    assert checks.session_answers(family) == [checks.answers(family)["interleaved"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_request_is_decoded_as_by_a_pristine_model(family, every):
    assert checks.unequal_requests(family, every=every) == (10 * (7 if every else 2), [])


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"])
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_model(family, every):
    tried, wrong = checks.unequal_strategies(family, every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


@pytest.mark.slow
def test_models_of_the_older_classes_may_draft_for_those_of_the_newer():
    with torch.inference_mode():
        assert check_pair(checks.model("glm4v_moe"), checks.model("glm46v", "small")) == 192
        assert check_family(checks.folder("glm46v") / "target", checks.folder("glm4v_moe") / "target") == 7 * 14


@pytest.mark.parametrize(("family", "layer"), [("glm4v", "Glm4vRMSNorm"), ("glm4v_moe", "Glm4vMoeRMSNorm")])
def test_its_language_model_runs_eagerly_and_says_why(family, layer):
    assert why_not(checks.model(family)) == f"one of its layers is a {layer}"


@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"])
def test_ranks_cannot_share_its_fused_layers(family):
    from specvlm.models.load import spread_of

    with pytest.raises(
        UserError, match=r"^parallel=tensor: ranks cannot share mlp\.(gate_up_proj|shared_experts.gate_proj) of"
    ):
        spread_of(transformers.AutoConfig.from_pretrained(checks.folder(family) / "target"), (), SimpleNamespace(size=2), None)


@pytest.mark.parametrize("request_", ["video", "odd frames", "two videos"])
def test_recorded_attention_of_a_frame_sums_to_one(request_):
    lm, prompt, sight = checks.model("glm4v"), checks.prompt("glm4v", request_), VisionProbe()
    lm.features(prompt, sight=sight)
    totals = [part.unflatten(0, (grid.frames, -1)).sum(1) * 4 for part, grid in zip(
        sight.attention().split([len(grid) for grid in prompt.grids]), prompt.grids, strict=True
    )]  # fmt: skip
    assert torch.allclose(torch.cat(totals), torch.ones(sum(grid.frames for grid in prompt.grids)), atol=1e-5)


def test_a_single_frame_is_repeated():
    lm = checks.model("glm4v")
    (grid, one), (_, two) = (lm.process_video(checks.clip(count, 96, 128, 2.0)) for count in (1, 2))
    assert grid.frames == 1 and one["thw"] == two["thw"] and one["times"] == [0.0]
    assert not torch.equal(one["pixels"], two["pixels"])


def newer():
    """`sample_frames` of GLM-4.6V's processor, which needs torchvision, read from its file."""
    path = Path(transformers.__file__).parent / "models/glm46v/video_processing_glm46v.py"
    (found,) = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == "sample_frames"
    ]
    for argument in found.args.args:
        argument.annotation = None
    place = {"np": np}
    exec(compile(ast.Module([found], []), str(path), "exec"), place)
    return place["sample_frames"]


CLIPS = [
    (300, 30000 / 1001),
    (90, 30.0),
    (3, 25.0),
    (1, 8.0),
    (17, 2.0),
    (999, 23.976),
    (9000, 29.97),
    (40000, 25.0),
    (700, 1.0),
]


@pytest.mark.parametrize(("total", "fps"), [*CLIPS, (80000, 25.0), (620, 2.0)])
@pytest.mark.parametrize("family", ["glm4v", "glm46v"])
def test_frames_are_those_of_hugging_faces_processor(family, total, fps):
    """Which repeats an odd last one, to fill a temporal patch."""
    theirs = Glm4vVideoProcessor.sample_frames if family == "glm4v" else newer()
    processor = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
    want = theirs(processor, VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps), fps=2).tolist()
    asked = checks.model(family).sampling(VideoInfo(total, fps, 9, 9, total / fps))
    ours = asked["sampling"](total, asked["frames"])
    assert ours + ours[-1:] * (len(ours) % 2) == want or (not want and ours == [0])
