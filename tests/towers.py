"""What a vision tower made of a video, kept for tests that decode the same one hundreds of times."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

from specvlm.models.video_lm import VideoLM
from specvlm.types import VideoPrompt


def remember_features(lm: VideoLM) -> VideoLM:
    """Make `lm` look at each video once. Prompts are told apart by what is in them: strategies are given copies."""
    known: dict[Hashable, Tensor] = {}

    def features(prompt: VideoPrompt, keep=None, sight=None, compute=lm.features):
        if sight is not None:
            return compute(prompt, keep, sight)
        key = tuple(contents(prompt.videos))
        if key not in known:
            known[key] = compute(prompt)  # of all frames, whatever is kept: a row does not depend on other frames
        return known[key].clone()

    lm.features = features
    return lm


def contents(value: Any) -> Iterator[Hashable]:
    """Every value inside, in order, tensors as their bytes; of objects that are neither their type alone."""
    if isinstance(value, Tensor):
        yield str(value.dtype), tuple(value.shape), value.contiguous().cpu().numpy().tobytes()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from contents(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from contents(part)
    else:
        yield value if isinstance(value, (int, float, str, bool, type(None))) else type(value)
