"""VideoLLaMA 3: the contract, prompts and frames like Hugging Face's, and decodes like those of a pristine model."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace

import family_checks as checks
import family_folders
import packages
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from specvlm.models.load import load
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing import check_family
from specvlm.video.video import VideoInfo

FAMILY = "video_llama_3"


@pytest.fixture(autouse=True, scope="module")
def installed():
    with packages.installed("specvlm-video-llama-3"):
        yield


@pytest.mark.slow
def test_it_keeps_the_contract():
    assert check_family(checks.folder(FAMILY) / "target", checks.folder(FAMILY) / "small") == 7 * 14


@pytest.mark.slow
def test_prompts_equal_those_of_hugging_faces_processor():
    """Among them videos whose frames have unequal numbers of tokens."""
    assert checks.unlike_the_processor(FAMILY) == (12 + 15 + 5, [])


def test_a_still_video_is_one_row_of_tokens_in_a_run_per_frame():
    (grid,), (video,) = checks.prompt(FAMILY, "still").grids, checks.prompt(FAMILY, "still").videos
    runs = checks.model(FAMILY).runs(grid, video)
    assert (grid.frames, grid.height) == (1, 1) and len(runs) == 6 and runs[0] > max(runs[1:])


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
@pytest.mark.parametrize("request_", ["video", "still"])
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_model(request_, every):
    tried, wrong = checks.unequal_strategies(FAMILY, request_, every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


@pytest.mark.parametrize("request_", ["video", "still"])
def test_recorded_attention_is_that_of_the_towers_last_layer(request_):
    """Against Hugging Face's eager attention, token by token: the four patches of a token are neighbours."""
    lm, prompt = checks.model(FAMILY), checks.prompt(FAMILY, request_)
    sight, pristine, video = VisionProbe(), family_folders.video_llama_3(), prompt.videos[0]
    lm.features(prompt, sight=sight)
    tower, weights = pristine.model.vision_model.eval(), []
    tower.load_state_dict(lm.hf.model.vision_model.state_dict())
    tower.set_attn_implementation("eager")
    tower.encoder.layers[-1].self_attn.register_forward_hook(lambda module, given, made: weights.extend(made[1]))
    with torch.inference_mode():
        tower(video["pixels"].flatten(0, 1), grid_thw=video["thw"], merge_sizes=video["merge"])
    received_N4 = torch.cat([weight_1HPP[0].mean((0, 1)) for weight_1HPP in weights]).unflatten(0, (-1, 4))
    assert len(weights) == 6 and torch.allclose(sight.attention(), received_N4.mean(1)[video["kept"]], atol=1e-6)


def theirs():
    """`sample_frames` of transformers' video processor, which needs torchvision, read from its file."""
    path = Path(transformers.__file__).parent / "models/video_llama_3/video_processing_video_llama_3.py"
    (found,) = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == "sample_frames"
    ]
    found.returns = None
    for argument in found.args.args:
        argument.annotation = None
    place = {"torch": torch, "math": math}
    exec(compile(ast.Module([found], []), str(path), "exec"), place)
    return place["sample_frames"]


@pytest.mark.parametrize(("total", "fps"), [(300, 30000 / 1001), (90, 30.0), (3, 25.0), (999, 23.976), (17, 2.0)])
@pytest.mark.parametrize("settings", [{}, {"fps": 2.5}, {"do_sample_frames": False}, {"fps": None, "num_frames": 3}])
def test_frames_are_those_of_hugging_faces_processor(tmp_path, monkeypatch, total, fps, settings):
    lm = checks.model(FAMILY)
    found = json.loads((lm.folder / "video_preprocessor_config.json").read_text()) | settings
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(found))
    monkeypatch.setattr(lm, "folder", tmp_path)
    asked = lm.sampling(VideoInfo(total, fps, 9, 9, total / fps))
    ours = asked["sampling"](total, asked["frames"])
    if not found["do_sample_frames"]:
        assert ours == list(range(total))
        return
    names = ("num_frames", "fps", "temporal_patch_size", "min_frames", "max_frames")
    processor = SimpleNamespace(**{name: found.get(name) for name in names})
    assert ours == theirs()(processor, VideoMetadata(total_num_frames=total, fps=fps)).tolist()


@pytest.mark.slow
def test_the_tiny_checkpoints_of_the_examples_keep_the_contract(tmp_path):
    example = packages.FOLDERS[0].parents[1] / "examples" / "tiny_checkpoints.py"
    place = {"__name__": "tiny_checkpoints"}
    exec(example.read_text(), place)
    place["main"](str(tmp_path))
    assert load(tmp_path / "draft", "float32").family == FAMILY
    assert check_family(tmp_path / "target", tmp_path / "draft") == 7 * 14
