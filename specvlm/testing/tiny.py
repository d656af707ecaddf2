"""Tiny random models of both families, with fewer than 40,000 weights each, and prompts to check drafters with.

The models are float64, so that a difference between two outputs comes from a fault and not from rounding.
"""

import copy
from functools import cache
from typing import Any

import torch

from specvlm.models import attention
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.video_lm import VideoLM
from specvlm.types import TokenGrid, VideoPrompt

FAMILIES = ("qwen2_5_vl", "llava_onevision")
VOCABULARY = 97
VIDEO, IMAGE, START, END = 90, 91, 92, 93
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=False, use_sliding_window=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


@cache
def model(family: str, seed: int = 0, vocabulary: int = VOCABULARY) -> VideoLM:
    """Build a model with random weights. They depend only on the arguments, not on the state of torch's generator."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return wrapped(built(family, vocabulary).double())


@cache
def noisy(family: str, noise: float = 0.02) -> VideoLM:
    """Return a copy of `model(family)` with Gaussian noise on its weights. As its draft it often guesses right, not always.

    noise: Standard deviation of the noise.
    """
    hf, generator = copy.deepcopy(model(family).hf), torch.Generator().manual_seed(1)
    for weight in hf.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return wrapped(hf)


def prompt(family: str, seed: int = 0, frames: int = 4) -> VideoPrompt:
    """Build a prompt of 14 random text tokens, with a random video after the first five."""
    generator = torch.Generator().manual_seed(100 + seed)
    words = torch.randint(5, 80, (14,), generator=generator).tolist()
    grid = TokenGrid(frames, 3, 3, newline=1)
    video: dict[str, Any] = {"pixels": torch.randn(frames, 3, 20, 20, generator=generator)}
    if family == "qwen2_5_vl":
        pixels = torch.randn(frames * 32, 96, generator=generator)
        grid, video = TokenGrid(frames, 4, 2), {"pixels": pixels, "thw": (frames, 8, 4), "seconds": 1.0}
    return model(family).expand([*words[:5], START, VIDEO, END, *words[5:]], [grid], [video])


def wrapped(hf: Any) -> VideoLM:
    """Wrap a Hugging Face model in its family's `VideoLM`, with specvlm's attention."""
    attention.register()
    hf = hf.eval().requires_grad_(False)
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    return (LlavaOneVision if hf.config.model_type == "llava_onevision" else Qwen2_5_VL)(hf)


def built(family: str, vocabulary: int, **text: Any) -> Any:
    """Build a Hugging Face model with random weights from torch's global generator.

    Args:
        family: "qwen2_5_vl" or "llava_onevision".
        vocabulary: Number of token ids.
        text: Other settings of its language model.
    """
    return (_qwen if family == "qwen2_5_vl" else _llava)(TEXT | {"vocab_size": vocabulary} | text)


def _qwen(text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        window_size=16, fullatt_block_indexes=[1], out_hidden_size=32, tokens_per_second=2, initializer_range=0.2,
    )  # fmt: skip
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    text = text | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )


def _llava(text: dict[str, Any]) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4,
        initializer_range=0.2,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=Qwen2Config(**text, rope_parameters=ROPE),
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=[[20, 20], [20, 40], [40, 20]],
            tie_word_embeddings=False,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
