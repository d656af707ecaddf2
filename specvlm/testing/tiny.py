"""Tiny random models of the built-in families, with fewer than 40,000 weights each, and prompts for checking drafters.

The models are float64, so that a difference between two outputs comes from a bug and not from rounding.
"""

import copy
from functools import cache
from typing import Any

import torch

from specvlm.models import attention, families
from specvlm.models.video_lm import VideoLM
from specvlm.types import VideoPrompt

FAMILIES = ("qwen2_5_vl", "llava_onevision")
VOCABULARY = 97
VIDEO, IMAGE, START, END = 90, 91, 92, 93
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=False, use_sliding_window=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)  # fmt: skip


@cache
def model(family: str, seed: int = 0, vocabulary: int = VOCABULARY) -> VideoLM:
    """Build a model with random weights. They depend only on the arguments, not on the state of torch's generator."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return wrapped(built(family, vocabulary).double())


@cache
def noisy(family: str, noise: float = 0.02) -> VideoLM:
    """Return a copy of `model(family)` with noisy weights. As that model's draft it guesses right often, not always.

    noise: Standard deviation of the Gaussian noise.
    """
    hf, generator = copy.deepcopy(model(family).hf), torch.Generator().manual_seed(1)
    for weight in hf.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return wrapped(hf)


def prompt(family: str, seed: int = 0, frames: int = 4) -> VideoPrompt:
    """Build a prompt of 14 random text tokens, with a random video after the first five."""
    generator = torch.Generator().manual_seed(100 + seed)
    words = torch.randint(5, 80, (14,), generator=generator).tolist()
    lm = model(family)
    grid, video = lm.tiny_video(frames, generator)
    slots = [token for _ in lm.runs(grid, video) for token in (START, VIDEO, END)]
    return lm.expand([*words[:5], *slots, *words[5:]], [grid], [video])


def wrapped(hf: Any) -> VideoLM:
    """Wrap a Hugging Face model in its family's `VideoLM`, with specvlm's attention."""
    attention.register()
    hf = hf.eval().requires_grad_(False)
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    return families.find(hf.config.model_type)(hf)


def built(family: str, vocabulary: int, **text: Any) -> Any:
    """Build a Hugging Face model with random weights from torch's global generator.

    Args:
        family: Name of a family that has a tiny model.
        vocabulary: Number of token ids.
        text: Other settings of its language model.
    """
    return families.find(family).tiny(TEXT | {"vocab_size": vocabulary} | text, IDS)
