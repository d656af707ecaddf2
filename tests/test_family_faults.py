"""What is said of a family's own mistakes: one line with family and method, and the traceback if it is asked for."""

from __future__ import annotations

import family_checks as checks
import packages
import pytest
import torch

from specvlm.errors import OutOfMemory, UserError
from specvlm.models import families
from specvlm.models.families import Source
from specvlm.models.load import load
from specvlm.models.plugins import PluginError
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing.family import random_clip
from specvlm.video.video import VideoInfo

HERE, FAMILY = "test_family_faults", "qwen2_vl"
packages.module_of(next(folder for folder in packages.FOLDERS if folder.name == "specvlm-qwen2-vl"))
from specvlm_qwen2_vl import Qwen2VL  # noqa: E402


class GridIsATuple(Qwen2VL):
    def process_video(self, clip, max_pixels=None):
        grid, video = super().process_video(clip, max_pixels)
        return (grid.frames, grid.height, grid.width), video


class SizesAreMissing(Qwen2VL):
    @staticmethod
    def hf_inputs(config, prompt):
        made = Qwen2VL.hf_inputs(config, prompt)
        return {name: value for name, value in made.items() if name != "video_grid_thw"}


class PixelsAreANumber(Qwen2VL):
    @staticmethod
    def hf_inputs(config, prompt):
        return Qwen2VL.hf_inputs(config, prompt) | {"scale": 2.0}


class KeyIsMissing(Qwen2VL):
    def process_video(self, clip, max_pixels=None):
        return super().process_video(clip, {}["most"])


class RunsHaveNoVideo(Qwen2VL):
    def runs(self, grid):
        return [len(grid)]


class RunsAreShort(Qwen2VL):
    def runs(self, grid, video):
        return [len(grid) - 1]


class ImagesAreOdd(Qwen2VL):
    def image_runs(self, image):
        return [image["tokens"] - 1, 2]

    def template(self, videos):
        return 7 if videos else None


class MemoryEnds(Qwen2VL):
    def process_video(self, clip, max_pixels=None):
        raise OutOfMemory("cpu ran out of memory")


class NoFamily(VideoLM):
    axes = 1


class NoAxes(VideoLM):
    family = FAMILY


class Careless(Qwen2VL):
    """Fails after loading, in what a request calls."""

    refused = short = False

    def check_settings(self):
        if self.refused:
            raise UserError("patches of 14 and 16")
        raise AttributeError("no such setting")

    def _tower(self, pixels, thw, sight=None):
        return super()._tower(pixels, thw, sight)[int(self.short) :]

    def sampling(self, info):
        return {"num_frames": 16}

    def process_image(self, image, alone=True):
        made = super().process_image(image, alone)
        return {name: value for name, value in made.items() if name != "tokens"}

    def encode_video(self, grid, video, frames, sight=None):
        return super().encode_video(grid, video, frames)

    def encode_image(self, image):
        return torch.zeros(image["tokens"] - 1, 8)


@pytest.fixture
def loaded(monkeypatch):
    def load_as(cls):
        source = Source(f"{HERE}:{cls.__name__}", "specvlm-broken 0.1")
        monkeypatch.setattr(families, "sources", lambda: {FAMILY: source})
        return load(checks.folder(FAMILY) / "small", "float32")

    monkeypatch.delenv("SPECVLM_PLUGIN_TRACEBACK", raising=False)
    return load_as


AT = rf"model family qwen2_vl: {HERE}\.\w+\."
WHERE = r" \(SPECVLM_PLUGIN_TRACEBACK=1 shows where\)$"
FORWARD = "small: transformers' own forward fails .*: check what test_family_faults.SizesAreMissing.hf_inputs returns, and that"


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (
            GridIsATuple,
            rf"^{AT}process_video must return a TokenGrid and a dict of tensors, got \(\(1, .*\), {{'pixels': Tensor,",
        ),
        (KeyIsMissing, rf"^{AT}process_video raised KeyError: 'most', in line \d+{WHERE}"),
        (RunsHaveNoVideo, rf"^{AT}runs raised TypeError: .*takes 2 positional arguments but 3 were given{WHERE}"),
        (
            RunsAreShort,
            rf"^{AT}runs must return whole numbers that add up to the tokens of the grid, TokenGrid\(.*\), got \[\d+\]$",
        ),
        (PixelsAreANumber, rf"^{AT}hf_inputs must return a dict of tensors, got {{'input_ids': Tensor, .*, 'scale': 2.0}}$"),
        (SizesAreMissing, rf"{FORWARD} config.json fits the weights{WHERE}"),
        (NoFamily, rf"specvlm-broken 0.1: {HERE}:NoFamily does not define family, check_settings, "),
        (NoAxes, rf"specvlm-broken 0.1: {HERE}:NoAxes does not define axes, check_settings, "),
        (MemoryEnds, "^cpu ran out of memory$"),
    ],
)
def test_a_fault_at_the_start_is_one_line_with_family_and_method(loaded, cls, said):
    with pytest.raises(UserError, match=said) as caught:
        loaded(cls)
    assert "\n" not in str(caught.value)


def test_the_traceback_is_logged_if_it_is_asked_for(loaded, monkeypatch, caplog):
    monkeypatch.setenv("SPECVLM_PLUGIN_TRACEBACK", "1")
    with pytest.raises(PluginError, match=r"process_video raised KeyError: 'most', in line \d+$"):
        loaded(KeyIsMissing)
    assert 'super().process_video(clip, {}["most"])' in caplog.text
    with pytest.raises(PluginError, match=r"that config.json fits the weights$"):
        loaded(SizesAreMissing)
    assert "Traceback" in caplog.records[-1].getMessage() and "modeling_qwen2_vl.py" in caplog.records[-1].getMessage()


@pytest.fixture
def careless(loaded):
    with torch.inference_mode():
        yield loaded(Careless)


def test_settings_that_fail_are_told_and_those_that_are_refused_stay_as_they_are(careless, monkeypatch):
    with pytest.raises(PluginError, match=rf"^{AT}check_settings raised AttributeError: no such setting, in line \d+{WHERE}"):
        careless.check_settings()
    careless.refused = True
    with pytest.raises(UserError, match="^patches of 14 and 16$"):
        careless.check_settings()


def test_a_wrong_key_of_sampling_names_those_there_are(careless):
    said = rf"^{AT}sampling returns 'num_frames'; it may have fps, frames, max_frames, .*\. Did you mean \"\w+_frames\"\?$"
    with pytest.raises(PluginError, match=said):
        careless.sampling(VideoInfo(40, 4.0, 28, 28, 10.0))


def test_wrong_runs_of_an_image_and_a_wrong_template_are_told(loaded):
    lm = loaded(ImagesAreOdd)
    said = (
        rf'^{AT}image_runs must return whole numbers that add up to the \d+ tokens of the image \("tokens"\), got \[\d+, 2\]$'
    )
    with pytest.raises(PluginError, match=said):
        lm.prompt("what ?", [], [checks.picture(90, 120)])
    with pytest.raises(PluginError, match=rf"^{AT}template must return a chat template or None, got 7$"):
        lm.prompt("what ?", [checks.clip(4, 64, 80, 1.0)])


def test_an_image_without_tokens_is_told(careless):
    with pytest.raises(PluginError, match=rf'^{AT}process_image must return .* image\'s tokens under "tokens", got {{\'pixels'):
        careless.prompt("what ?", [], [checks.picture(90, 120)])


def test_sight_that_is_ignored_and_rows_that_are_missing_are_told(careless):
    prompt = careless.prompt("describe the video .", [random_clip(6)])
    assert len(careless.features(prompt)) == 45
    with pytest.raises(PluginError, match=rf"^{AT}encode_video is given `sight` and adds 0 of 45 tokens to it: call sight.add"):
        careless.features(prompt, sight=VisionProbe())
    careless.short = True
    with pytest.raises(
        PluginError, match=rf"^{AT}encode_video raised ValueError: encode gives 44 rows for 3 frames of 15 tokens"
    ):
        careless.features(prompt)
    with pytest.raises(PluginError, match=rf'^{AT}encode_image returns 5 rows of features, and the image \("tokens"\) has 6'):
        careless.encode_image({"tokens": 6})
