"""Hugging Face's own models and answers. Nothing of specvlm runs in them, so they catch bugs that its loops share.

A reference is a separate object from the model under test: Hugging Face's class created anew from the same settings,
with a copy of the weights, its own attention and its own loop. Its inputs and positions are made here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from specvlm.types import VideoPrompt


def pristine(hf: Any, attention: str = "sdpa") -> Any:
    """Create a separate model with the weights of `hf`, a model of unquantised linear layers.

    attention: `sdpa`, in the model's dtype throughout, or `eager`, whose softmax is always float32.
    """
    assert type(hf).__module__.startswith("transformers."), "a reference must be a class of Hugging Face's"
    config = copy.deepcopy(hf.config)
    config._attn_implementation = attention  # of its parts too
    with torch.random.fork_rng(devices=()):  # weights are drawn before they are copied
        made = type(hf)(config).to(hf.device, hf.dtype)
    made.load_state_dict(hf.state_dict())
    made.generation_config = copy.deepcopy(hf.generation_config)
    return made.eval().requires_grad_(False)


def inputs_of(hf: Any, prompt: VideoPrompt) -> dict[str, Any]:
    """Make the inputs that Hugging Face's processor would give the model: tokens, pixels and their grids."""
    tokens_1S, videos, images = prompt.tokens[None], prompt.videos, prompt.images
    inputs: dict[str, Any] = {"input_ids": tokens_1S, "attention_mask": torch.ones_like(tokens_1S)}
    if hf.config.model_type == "llava_onevision":
        stacked = torch.stack
        if images:
            inputs["image_sizes"] = torch.tensor([image["size"] for image in images])
            inputs["batch_num_images"] = torch.tensor([len(images)])
    else:
        stacked = torch.cat
        inputs["mm_token_type_ids"] = torch.zeros_like(tokens_1S, dtype=torch.int32)
        inputs["mm_token_type_ids"][tokens_1S == hf.config.image_token_id] = 1
        inputs["mm_token_type_ids"][tokens_1S == hf.config.video_token_id] = 2
        if images:
            inputs["image_grid_thw"] = torch.tensor([image["thw"] for image in images])
        if videos:
            inputs["video_grid_thw"] = torch.tensor([video["thw"] for video in videos])
            if hf.config.model_type != "qwen3_vl":
                inputs["second_per_grid_ts"] = torch.tensor([video["seconds"] for video in videos])
    if images:
        inputs["pixel_values"] = stacked([image["pixels"] for image in images]).to(hf.dtype)
    if videos:
        inputs["pixel_values_videos"] = stacked([video["pixels"] for video in videos]).to(hf.dtype)
    return {name: value.to(hf.device) for name, value in inputs.items()}


def generated(hf: Any, prompt: VideoPrompt, limit: int, **settings: Any) -> list[int]:
    """Return the greedy answer of Hugging Face's `generate`. settings: further arguments."""
    return scored(hf, prompt, limit, **settings)[0]


def scored(hf: Any, prompt: VideoPrompt, limit: int, **settings: Any) -> tuple[list[int], Tensor]:
    """Return the same answer, and the (T, V) logits that each token was chosen by."""
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True} | settings
    out = hf.generate(**inputs_of(hf, prompt), max_new_tokens=limit, **settings)
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def trained_positions(hf: Any, prompt: VideoPrompt) -> Tensor:
    """Compute (3, S) positions as Qwen2.5-VL was trained with them, token by token.

    Source: Qwen's own `get_rope_index` (transformers 4.49 to 4.57). A text token comes after all before it, on all
    three axes alike. A video's tokens are counted from there, its time in steps of `tokens_per_second`, truncated.
    """
    vision = hf.config.vision_config
    merge, pace, free = vision.spatial_merge_size, vision.tokens_per_second, 0
    items = {hf.config.image_token_id: iter(prompt.images), hf.config.video_token_id: iter(prompt.videos)}
    found: list[tuple[int, int, int]] = []
    tokens = prompt.tokens.tolist()
    while len(found) < len(tokens):
        if (token := tokens[len(found)]) not in items:
            found.append((free, free, free))
        else:
            item = next(items[token])
            frames, height, width = item["thw"]
            for frame in range(frames):
                time = int(frame * item.get("seconds", 0) * pace)
                found += [(free + time, free + y, free + x) for y in range(height // merge) for x in range(width // merge)]
        free = max(map(max, found)) + 1
    return torch.tensor(found).T


@torch.inference_mode()
def decoded(hf: Any, prompt: VideoPrompt, limit: int, positions_3S: Tensor, penalty: float = 1.0) -> list[int]:
    """Decode greedily with Hugging Face's modules at given positions; text continues after the largest of them."""
    penalties = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [])
    past, following = DynamicCache(config=hf.config.get_text_config()), int(positions_3S.max()) + 1
    out = hf(**inputs_of(hf, prompt), position_ids=positions_3S[:, None], past_key_values=past, use_cache=True)
    tokens_1T = prompt.tokens[None]
    while True:
        token_11 = penalties(tokens_1T, out.logits[:, -1]).argmax(-1, keepdim=True)
        tokens_1T = torch.cat([tokens_1T, token_11], 1)
        if (count := tokens_1T.shape[1] - len(prompt)) == limit:
            return tokens_1T[0, len(prompt) :].tolist()
        at_311 = torch.full((3, 1, 1), following + count - 1)
        out = hf(input_ids=token_11, position_ids=at_311, past_key_values=past, use_cache=True)


def ended(answer: list[int], limit: int, stops: frozenset[int]) -> list[int]:
    """Cut an answer after its first stop id, which stays, and at the limit."""
    kept: list[int] = []
    for token in answer[:limit]:
        kept.append(token)
        if token in stops:
            break
    return kept
