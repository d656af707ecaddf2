"""Tiny random models with recurrent layers, and drafts for them: the same with noise."""

from __future__ import annotations

import copy
from typing import Any

import torch

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, initializer_range=0.2, eos_token_id=None, bos_token_id=None, pad_token_id=0, max_position_embeddings=4096,
)  # fmt: skip
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
NAMES = ("qwen3_5", "qwen3_next", "mamba2", "lfm2")


def built(name: str) -> Any:
    """Build a model: three of four layers recurrent, all of them (mamba2), or convolutions with a short state (lfm2)."""
    import transformers

    if name == "qwen3_5":
        return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SIZES, **DELTA))
    if name == "qwen3_next":
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
        return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SIZES, **DELTA, **experts))
    if name == "mamba2":
        sizes = {
            key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "pad_token_id")
        }
        mamba = dict(num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=32, eos_token_id=None, bos_token_id=None)
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **mamba))
    if name == "lfm2":
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
        kinds = ["conv", "conv", "full_attention", "conv"]
        return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes, layer_types=kinds, block_auto_adjust_ff_dim=False))
    raise ValueError(f"{name} is none of {', '.join(NAMES)}")


def pair(name: str, seed: int = 0, noise: float = 0.01) -> tuple[Any, Any]:
    """Build a target, and a draft that guesses some of its tokens. noise: of the draft's weights, in their own size."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        target = built(name).eval().requires_grad_(False)
        draft = copy.deepcopy(target)
        for weight in draft.parameters():
            weight += noise * float(weight.float().std(correction=0)) * torch.randn_like(weight)
    return target, draft
