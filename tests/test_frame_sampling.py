"""Frame sampling by a checkpoint's settings equals Hugging Face's video processors, capped at the clip's frames.

``python tests/test_frame_sampling.py``, in an environment with torchvision, rewrites ``tests/data/frame_sampling.json``
(see test_preprocess.py). Cases where Hugging Face itself raises are stored as null.
"""

from __future__ import annotations

import json
import sys
from copy import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specvlm.config import model_folder
from specvlm.errors import UserError
from specvlm.video.settings import SamplingSettings
from specvlm.video.video import Clip, probe, read_video

FROZEN = Path(__file__).parent / "data" / "frame_sampling.json"
TYPES = {"qwen2_5_vl": "Qwen2VLVideoProcessor", "llava_onevision": "LlavaOnevisionVideoProcessor"}
QWEN = [
    {"fps": 2},
    {"fps": 2, "max_frames": 32},
    {"fps": 1, "min_frames": 16},
    {"fps": 0.1},
    {"fps": 2, "max_frames": 33},
    {"fps": 2, "min_frames": 16, "max_frames": 8},
    {"fps": 2, "min_frames": 7, "max_frames": 11},
    {"num_frames": 7},
    {"num_frames": 9},
    {"num_frames": 32},
]
LLAVA = [{"fps": 1}, {"fps": 0.5}, {"fps": 2}, {"fps": 0.01}, {"num_frames": 7}, {"num_frames": 32}]
CLIPS = [(1, 1.0), (2, 1.0), (3, 25.0), (5, 1.0), (20, 1.0), (21, 1.0), (90, 25.0), (101, 29.97), (250, 10.0)]  # frames, fps
CASES = {
    f"{family} {json.dumps(settings)} {total} at {fps}": (family, settings, total, fps)
    for family, some in (("qwen2_5_vl", QWEN), ("llava_onevision", LLAVA))
    for settings in some
    for total, fps in CLIPS
}


def frozen_indices() -> dict[str, list[int] | None]:
    """Return by case the frames that Hugging Face samples."""
    from test_preprocess import allow_torchvision_without_its_operators

    allow_torchvision_without_its_operators()
    from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

    kinds = {"qwen2_5_vl": Qwen2VLVideoProcessor, "llava_onevision": LlavaOnevisionVideoProcessor}
    found: dict[str, list[int] | None] = {}
    for name, (family, settings, total, fps) in CASES.items():
        try:
            index = kinds[family](**settings).sample_frames(SimpleNamespace(total_num_frames=total, fps=fps))
            found[name] = [int(place) for place in index]
        except (ValueError, ZeroDivisionError, RuntimeError):
            found[name] = None
    return found


def clip_of(total: int, fps: float) -> Clip:
    """Make tiny frames that encode their number."""
    frames = torch.arange(total).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return Clip(frames, tuple(place / fps for place in range(total)), fps, "clip", total, fps)


@cache
def target(family: str):
    """Make a skeleton model whose folder a test may change."""
    from specvlm.models.load import skeleton  # behind what makes torchvision importable

    return skeleton(model_folder(f"embedded:{family}/target"), "hf")


def sampled(family: str, folder: Path, clip: Clip, **settings) -> list[int]:
    """Return the numbers of the frames taken with these video processor settings."""
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": settings}))
    model = copy(target(family))
    model.folder = folder
    return read_video(clip, **model.sampling(probe(clip))).frames[:, 0, 0, 0].tolist()


def test_frames_are_those_that_hugging_face_takes(tmp_path):
    frozen, checked = json.loads(FROZEN.read_text()), 0
    assert frozen.keys() == CASES.keys()
    for name, (family, settings, total, fps) in CASES.items():
        if frozen[name] is not None:
            # ours has a bound where Hugging Face's LLaVA-OneVision has none
            bound = {"max_frames": 768} if family == "llava_onevision" else {}
            assert sampled(family, tmp_path, clip_of(total, fps), **settings, **bound) == frozen[name], name
            checked += 1
    assert checked > 90


@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize(("total", "fps"), CLIPS)
def test_a_clip_shorter_than_the_settings_ask_for_is_shown_whole(tmp_path, family, total, fps):
    """Hugging Face refuses it. Qwen's frames come in pairs."""
    whole = list(range(total)) if family == "llava_onevision" or total == 1 else list(range(total // 2 * 2))
    for settings in ({"num_frames": 300}, {"fps": 100, "max_frames": 300}):
        found = sampled(family, tmp_path, clip_of(total, fps), **settings)
        assert len(found) == len(whole), settings
        assert total % 2 or found == whole


def test_twenty_seconds_at_one_frame_a_second_are_twenty_frames(tmp_path):
    """With the embedded pairs' settings, and with none."""
    for family, settings in (("qwen2_5_vl", {"fps": 2, "max_frames": 32}), ("llava_onevision", {"fps": 1})):
        assert sampled(family, tmp_path, clip_of(20, 1.0), **settings) == list(range(20))
        assert sampled(family, tmp_path, clip_of(20, 1.0), do_normalize=True) == list(range(20))


def test_the_fewest_frames_are_those_of_the_settings(tmp_path):
    found = [len(sampled("qwen2_5_vl", tmp_path, clip_of(100, 25.0), min_frames=fewest)) for fewest in (2, 4, 16, 17, 300)]
    assert found == [8, 8, 16, 16, 100]


def test_a_rate_of_llava_is_bounded_by_32_frames_or_those_of_the_settings(tmp_path):
    found = [len(sampled("llava_onevision", tmp_path, clip_of(200, 1.0), fps=1, **more)) for more in ({}, {"max_frames": 50})]
    assert found == [32, 50]


@pytest.mark.parametrize("family", TYPES)
def test_a_processor_that_leaves_sampling_to_its_caller_has_the_familys_own_rule(tmp_path, family):
    found = [len(sampled(family, tmp_path, clip_of(90, 25.0), do_sample_frames=word, num_frames=8)) for word in (True, False)]
    assert found == [8, 6 if family == "qwen2_5_vl" else 32]


def test_more_frames_than_there_are_stay_refused_where_they_were_asked_for():
    with pytest.raises(UserError, match="has 20 frames, fewer than the 32 asked for: set frames=20 or less"):
        read_video(clip_of(20, 1.0), frames=32)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fps": "2"}, "fps='2' of the video processor: expected a number more than 0"),
        ({"fps": -1}, "fps=-1"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": True}, "fps=True"),
        ({"max_frames": 0}, "max_frames=0 of the video processor: expected a whole number"),
        ({"min_frames": 2.5}, "min_frames=2.5"),
        ({"num_frames": [8]}, "num_frames"),
        ({"fps": 2, "num_frames": 8}, "cannot both be set"),
    ],
)
@pytest.mark.parametrize("family", TYPES)
def test_settings_that_make_no_sense_are_one_line(tmp_path, family, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        sampled(family, tmp_path, clip_of(90, 25.0), **settings)
    assert "\n" not in str(caught.value)


def test_the_embedded_pairs_settings_are_read():
    folders = [model_folder(f"embedded:{family}/target") for family in TYPES]
    found = [SamplingSettings.from_folder(folder, (kind[:4],)) for folder, kind in zip(folders, TYPES.values(), strict=True)]
    assert found == [SamplingSettings(2, None, 4, 32), SamplingSettings(1)]
    assert SamplingSettings.from_folder(str(folders[0]), ("Qwen",)) == found[0]  # a folder may be a text


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    FROZEN.write_text(json.dumps(frozen_indices()) + "\n")


@pytest.mark.parametrize(("there", "asked", "told"), [(7, 8, 6), (7, 7, 6), (1, 4, 1), (6, 9, 6)])
def test_the_number_of_frames_that_is_proposed_can_be_read(there, asked, told):
    clip = clip_of(there, 1.0)
    with pytest.raises(UserError, match=f"set frames={told} or less"):
        read_video(clip, frames=asked, sampling="qwen")
    assert len(read_video(clip, frames=told, sampling="qwen").frames) == told
