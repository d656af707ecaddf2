"""Hugging Face's `generate` on a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from experiments.gpu_pair.measure import Stamps, synchronize
from experiments.gpu_pair.spread import restored
from specvlm.models.video_lm import VideoLM
from specvlm.types import VideoPrompt


def generated(target: VideoLM, prompts: Sequence[VideoPrompt], rounds: int, warm: int) -> dict[str, Any]:
    """Measure unmodified `generate` with SDPA on prompts of one length: time between tokens, and to the first one."""
    if len(set(map(len, prompts))) > 1:
        raise ValueError("a batch of prompts of unlike lengths would be padded: measure equal ones")
    each = [target.generate_inputs(prompt) for prompt in prompts]
    inputs = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    hf, stamps = target.hf, Stamps(target.device)
    parts = {"text_config": hf.config.get_text_config(), "vision_config": hf.config.vision_config}
    ours = {part: config._attn_implementation for part, config in parts.items()}
    hf.set_attn_implementation(dict.fromkeys(ours, "sdpa"))
    more = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with restored(lambda: hf.set_attn_implementation(ours)):
        hf.generate(**inputs, max_new_tokens=2, **more)
        synchronize(target.device)
        stamps.start()
        out = hf.generate(**inputs, max_new_tokens=rounds + warm, streamer=stamps, **more)
    gaps = [b - a for a, b in zip(stamps.at, stamps.at[1:], strict=False)][warm - 1 :]
    return {
        "round_ms": 1000 * median(gaps),
        "mean_round_ms": 1000 * sum(gaps) / len(gaps),
        "tokens_per_s": len(prompts) * len(gaps) / sum(gaps),
        "tokens_a_round": 1.0,
        "ms_per_token": 1000 * sum(gaps) / len(gaps),
        "first_token_ms": 1000 * (stamps.at[0] - stamps.begun_at),
        "rounds": len(gaps),
        "new_tokens": out.shape[1] - len(prompts[0]),
    }
