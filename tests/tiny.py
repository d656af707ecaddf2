"""Tiny random models of both families and prompts for them, in float64, for tests that need exact arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from functools import cache

import reference
import torch
from towers import contents

from specvlm.models.video_lm import VideoLM
from specvlm.testing.tiny import END, FAMILIES, IMAGE, START, TEXT, VIDEO, built
from specvlm.testing.tiny import wrapped as wrap
from specvlm.types import TokenGrid, VideoPrompt

__all__ = [
    "END", "FAMILIES", "IMAGE", "START", "TEXT", "VIDEO",
    "copy", "draft_of", "hf_greedy", "image", "model", "prompt", "video", "wrap",
]  # fmt: skip

ANSWERS: dict[Hashable, list[int]] = {}  # of `hf_greedy`

torch.set_num_threads(1)  # thousands of tiny operations: two threads on busy cores are ten times slower


@cache
def model(family: str, seed: int = 0, vocabulary: int = 97, dtype: torch.dtype = torch.float64) -> VideoLM:
    torch.manual_seed(seed)
    return wrap(built(family, vocabulary, num_hidden_layers=3).to(dtype))


@cache
def draft_of(family: str, noise: float = 0.02, seed: int = 1, dtype: torch.dtype = torch.float64) -> VideoLM:
    """Add noise to the target's weights: a draft that is often right, but not always."""
    torch.manual_seed(seed)
    hf = copy.deepcopy(model(family, dtype=dtype).hf)
    for weight in hf.parameters():
        weight.data += noise * torch.randn_like(weight)
    return wrap(hf)


def video(family: str, frames: int = 4, seed: int = 0, height: int = 8, width: int = 4) -> tuple[TokenGrid, dict]:
    """Make random pixels. height, width: of the patch grid (Qwen); LLaVA's is always 5x5, pooled to 3x3."""
    generator = torch.Generator().manual_seed(seed)
    if family == "qwen2_5_vl":
        pixels = torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator)
        return TokenGrid(frames, height // 2, width // 2), {"pixels": pixels, "thw": (frames, height, width), "seconds": 1.0}
    return TokenGrid(frames, 3, 3, newline=1), {"pixels": torch.randn(frames, 3, 20, 20, generator=generator)}


def image(family: str, seed: int = 5, alone: bool = True) -> dict:
    generator = torch.Generator().manual_seed(seed)
    if family == "qwen2_5_vl":
        return {"pixels": torch.randn(4 * 4, 96, generator=generator), "thw": (1, 4, 4), "tokens": 4}
    if not alone:  # one tile, and a newline token
        return {"pixels": torch.randn(1, 3, 20, 20, generator=generator), "size": (20, 40), "tokens": 25 + 1}
    # Two 20x20 tiles behind the whole picture: 25 + 5 rows of 10 + 5 newlines.
    return {"pixels": torch.randn(3, 3, 20, 20, generator=generator), "size": (20, 40), "tokens": 25 + 5 * 11}


def prompt(family: str, seed: int = 0, videos: int = 1, images: int = 0, frames: int = 4) -> VideoPrompt:
    generator = torch.Generator().manual_seed(100 + seed)
    words = torch.randint(5, 80, (40,), generator=generator).tolist()
    ids = words[:5]
    for _ in range(images):
        ids += [START, IMAGE, END]
    for number in range(videos):
        ids += [START, VIDEO, END, words[6 + number]]
    # Hugging Face stacks the videos of a LLaVA prompt, so there they are of one length.
    longer = 1 if family == "qwen2_5_vl" else 0
    pairs = [video(family, frames + longer * number, seed + number) for number in range(videos)]
    lm = model(family)
    return lm.expand(
        ids + words[20:28], [g for g, _ in pairs], [v for _, v in pairs], [image(family, alone=images == 1)] * images
    )


def hf_greedy(lm: VideoLM, request: VideoPrompt, limit: int, stops: list[int] | None = None) -> list[int]:
    """Return the answer of a pristine Hugging Face model with the same weights, under its own attention.

    Computed once for each set of weights, settings, tokens and pixels, all of which are compared.
    """
    hf = lm.hf
    made_of = hf.config.to_json_string(use_diff=False), hf.generation_config.to_dict(), dict(hf.state_dict())
    asked = request.tokens, list(request.videos), list(request.images), limit, stops
    key = type(hf), *contents((made_of, asked))
    if key not in ANSWERS:
        ANSWERS[key] = reference.generated(reference.pristine(hf), request, limit, eos_token_id=stops)
    return list(ANSWERS[key])
