"""Real footage, unlike what the embedded pairs were trained on: there their logits tie, as those of any model do."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

from towers import remember_features

from specvlm.config import model_folder
from specvlm.models.load import load
from specvlm.models.video_lm import VideoLM
from specvlm.types import VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.video import Clip, probe, read_video

FAMILIES = ("qwen2_5_vl", "llava_onevision")
QUESTIONS = (
    "describe the video.",
    "how many objects appear?",
    "what happens in the video?",
    "what is in the corner?",
    "which object moves?",
    "describe the scene in detail.",
)


@cache
def model(family: str, name: str, dtype: str, device: str = "cpu") -> VideoLM:
    """One of an embedded pair, which looks at a prompt's video once: campaigns decode the same one many times."""
    return remember_features(load(model_folder(f"embedded:{family}/{name}"), dtype, device))


def films() -> list[Path]:
    """The excerpt that travels with specvlm; of a folder named by SPECVLM_FOOTAGE every clip."""
    folder = os.environ.get("SPECVLM_FOOTAGE")
    return sorted(Path(folder).glob("*.mp4")) if folder else [find_clip("bbb_apple")]


@cache
def prompt(number: int) -> tuple[str, VideoPrompt]:
    """A family and a request to it: the same for the same number."""
    chance, family = random.Random(f"footage {number}"), FAMILIES[number % 2]
    film = films()[number // 2 % len(films())]
    start = chance.uniform(0, max(0.0, probe(film).duration - 4))
    clip = read_video(film, frames=chance.choice((4, 6, 8)), start=start, end=start + 4)
    return family, model(family, "target", "float32").prompt(chance.choice(QUESTIONS), [cropped(clip, chance)])


def cropped(clip: Clip, chance: random.Random) -> Clip:
    """A part of the picture, of one of several sizes and shapes."""
    high, wide = clip.frames.shape[2:]
    height, width = (max(112, int(size * chance.uniform(0.4, 1))) for size in (high, wide))
    top, left = chance.randint(0, max(0, high - height)), chance.randint(0, max(0, wide - width))
    frames = clip.frames[:, :, top : top + height, left : left + width].contiguous()
    return Clip(frames, clip.times, clip.fps, "", clip.total_frames, clip.source_fps)
