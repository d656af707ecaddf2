"""Tiny random models of both families and prompts for them, in float64, for tests that want exact arithmetic."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from specvlm.models import attention
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.video_lm import VideoLM
from specvlm.types import TokenGrid, VideoPrompt

torch.set_num_threads(1)  # thousands of tiny operations: two threads on busy cores are ten times slower

VIDEO, IMAGE, START, END = 90, 91, 92, 93
FAMILIES = ("qwen2_5_vl", "llava_onevision")
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=False, use_sliding_window=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def _qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        window_size=16, fullatt_block_indexes=[1], out_hidden_size=32, tokens_per_second=2, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=TEXT | {"vocab_size": vocabulary, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=False,
        )
    )


def _llava(vocabulary: int) -> LlavaOnevisionForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
        initializer_range=0.2,
    )
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=Qwen2Config(**TEXT, vocab_size=vocabulary, rope_parameters=rope),
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=[[20, 20], [20, 40], [40, 20]],
            tie_word_embeddings=False,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def wrap(hf: torch.nn.Module) -> VideoLM:
    attention.register()
    hf = hf.eval().requires_grad_(False)
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    return (Qwen2_5_VL if isinstance(hf, Qwen2_5_VLForConditionalGeneration) else LlavaOneVision)(hf)


@cache
def model(family: str, seed: int = 0, vocabulary: int = 97, dtype: torch.dtype = torch.float64) -> VideoLM:
    torch.manual_seed(seed)
    return wrap((_qwen if family == "qwen2_5_vl" else _llava)(vocabulary).to(dtype))


@cache
def draft_of(family: str, noise: float = 0.02, seed: int = 1, dtype: torch.dtype = torch.float64) -> VideoLM:
    """The target with noise on its weights: a drafter that is right often, not always."""
    torch.manual_seed(seed)
    hf = copy.deepcopy(model(family, dtype=dtype).hf)
    for weight in hf.parameters():
        weight.data += noise * torch.randn_like(weight)
    return wrap(hf)


def video(family: str, frames: int = 4, seed: int = 0, height: int = 8, width: int = 4) -> tuple[TokenGrid, dict]:
    """Random pixels. height, width: of the patch grid (Qwen); LLaVA's is fixed at 5x5, pooled to 3x3."""
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
    """Hugging Face's own answer."""
    out = lm.hf.generate(
        **lm.generate_inputs(request), max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    return out[0, len(request) :].tolist()
