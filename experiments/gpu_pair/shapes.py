"""The published shapes, and models of them with random weights, made on the device layer by layer.

Numbers are those of the released config.json files. Weights are normal with a standard deviation of 1/sqrt(fan-in), those
that write into the residual stream smaller by sqrt(2 * layers), norms are one. The head of an untied model is its embedding
moved by one row: every next token then stands out by many standard deviations (after token v comes v + 1), and neither
bfloat16 nor another order of summation can turn a greedy choice. Time and memory are those of any other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu_pair.spread import Placement, as_share, skeleton
from specvlm.errors import UserError, did_you_mean
from specvlm.models import attention
from specvlm.models.partition import Stage
from specvlm.models.quantize import quantize, quantize_share
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.types import TokenGrid, VideoPrompt

TEXT = dict(
    max_position_embeddings=128000, rms_norm_eps=1e-6, use_sliding_window=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """The language model: layers, width, query heads, KV heads, MLP width, vocabulary; tied: head = embedding."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    def config(self, **more: Any) -> dict[str, Any]:
        sizes = dict(hidden_size=self.width, intermediate_size=self.mlp, vocab_size=self.vocabulary)
        counts = dict(
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_window_layers=self.layers,
        )  # fmt: skip
        return TEXT | sizes | counts | {"tie_word_embeddings": self.tied} | more


@dataclass(frozen=True)
class Qwen:
    """Qwen2.5-VL. vision_mlp: 3420, 3456 in the 32B; small: a tower and rotary widths for tests."""

    text: Text
    vision_mlp: int = 3420
    small: bool = False
    family = "qwen2_5_vl"

    def config(self) -> Any:
        from transformers import Qwen2_5_VLConfig

        vision: dict[str, Any] = dict(
            depth=32, hidden_size=1280, intermediate_size=self.vision_mlp, num_heads=16, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
        )  # fmt: skip
        sections, theta, ids = [16, 24, 24], 1e6, (151655, 151656, 151652, 151653)
        if self.small:
            vision |= dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, window_size=16)
            vision |= dict(fullatt_block_indexes=[1])
            sections, theta, ids = [1, 1, 2], 1e3, (1, 2, 3, 4)
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": theta}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return Qwen2_5_VLConfig(
            text_config=self.text.config(rope_parameters=rope),
            vision_config=vision | {"out_hidden_size": self.text.width},
            tie_word_embeddings=self.text.tied,
            **dict(zip(names, ids, strict=True)),
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Temporal patches of 16 x 16 tokens (448 x 448 pixels), as few or many as come next to `tokens`."""
        side, patch = (2, 4) if self.small else (16, 14)
        frames = max(1, round(tokens / side**2))
        pixels = None
        if generator is not None:
            pixels = torch.randn(frames * 4 * side**2, 3 * 2 * patch**2, generator=generator)
        return TokenGrid(frames, side, side), {"pixels": pixels, "thw": (frames, 2 * side, 2 * side), "seconds": 1.0}


@dataclass(frozen=True)
class Llava:
    """LLaVA-OneVision: SigLIP so400m at 384 pixels, a projector of two layers, Qwen2."""

    text: Text
    small: bool = False
    family = "llava_onevision"

    def config(self) -> Any:
        from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

        vision: dict[str, Any] = dict(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16,
            image_size=384, patch_size=14,
        )  # fmt: skip
        side, theta, ids = 384, 1e6, (151646, 151647)
        if self.small:
            vision |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            vision |= dict(image_size=20, patch_size=4)
            side, theta, ids = 20, 1e3, (1, 2)
        rope = {"rope_type": "default", "rope_theta": theta}
        return LlavaOnevisionConfig(
            text_config=Qwen2Config(**self.text.config(rope_parameters=rope)),
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            image_token_id=ids[0],
            video_token_id=ids[1],
            image_grid_pinpoints=[[side, side], [side, 2 * side], [2 * side, side]],
            tie_word_embeddings=self.text.tied,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Frames of 14 x 14 tokens and a newline token behind the last."""
        side, pixel = (3, 20) if self.small else (14, 384)
        frames = max(1, round(tokens / side**2))
        pixels = None if generator is None else torch.randn(frames, 3, pixel, pixel, generator=generator)
        return TokenGrid(frames, side, side, newline=1), {"pixels": pixels}


QWEN_3B = Qwen(Text(36, 2048, 16, 2, 11008, 151936, tied=True))
QWEN_7B = Qwen(Text(28, 3584, 28, 4, 18944, 152064))
QWEN_32B = Qwen(Text(64, 5120, 40, 8, 27648, 152064), vision_mlp=3456)
LLAVA_7B = Llava(Text(28, 3584, 28, 4, 18944, 152000))
LLAVA_72B = Llava(Text(80, 8192, 64, 8, 29568, 152000))
TINY, TINY_DRAFT = Text(3, 32, 4, 2, 64, 997), Text(2, 32, 4, 2, 64, 997, tied=True)


@dataclass(frozen=True)
class Pair:
    """draft None: the target drafts for itself. target_weights: how the target's weights are stored unless said otherwise."""

    target: Qwen | Llava
    draft: Qwen | Llava | None
    target_weights: str = "bf16"


SHAPES = {
    "qwen2_5_vl_32b_7b": Pair(QWEN_32B, QWEN_7B),
    "qwen2_5_vl_32b_3b": Pair(QWEN_32B, QWEN_3B),
    "qwen2_5_vl_7b_3b": Pair(QWEN_7B, QWEN_3B),
    "qwen2_5_vl_7b_self": Pair(QWEN_7B, None),
    "llava_onevision_72b_7b": Pair(LLAVA_72B, LLAVA_7B, "fp8"),
    "tiny": Pair(Qwen(TINY, small=True), Qwen(TINY_DRAFT, small=True)),
    "tiny_self": Pair(Qwen(TINY, small=True), None),
    "tiny_llava": Pair(Llava(TINY, small=True), Llava(TINY_DRAFT, small=True)),
}


def pair_of(name: str) -> Pair:
    if name not in SHAPES:
        raise UserError(f"shape={name}: there is {', '.join(SHAPES)}.{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def prompt_of(lm: VideoLM, shape: Qwen | Llava, tokens: int, pixels: bool, seed: int = 0) -> VideoPrompt:
    """Ten text tokens, a video of about `tokens` tokens, fifty text tokens.

    pixels False: the same prompt, for a prefill that is left out (see models.py).
    """
    generator = torch.Generator().manual_seed(seed)
    grid, video = shape.video(tokens, generator if pixels else None)
    words = torch.randint(10, min(lm.vocabulary // 2, 100_000), (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    return lm.expand([*words[:10], lm.video_token, *words[10:]], [grid], [video])


def build(
    shape: Qwen | Llava,
    wrap: Callable[..., VideoLM],
    device: torch.device,
    dtype: torch.dtype,
    weights: str = "bf16",
    seed: int = 0,
    stages: Sequence[Stage] = (),
    ranks: ProcessGroup = SINGLE,
) -> VideoLM:
    """A model of that shape in `dtype`. weights: fp8, int8, int4 store the text part so, and never hold it whole in `dtype`.

    stages: where its layers shall be, each made where it stays. ranks: who share them, each making its share alone.
    """
    attention.register()
    hf = skeleton(model_class(shape), shape.config(), ranks)
    place = Placement(hf, stages or [Stage(device, 0, shape.text.layers)], seed, ranks.rank)
    _fill(hf, shape.text, place, dtype, weights, ranks)
    _buffers(hf, shape, place)
    left = [name for name, tensor in [*hf.named_parameters(), *hf.named_buffers()] if local_shard(tensor).is_meta]
    assert not left, left
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    return wrap(hf, stages=stages or None, ranks=ranks)


def model_class(shape: Qwen | Llava) -> Any:
    import transformers

    family = "Qwen2_5_VL" if isinstance(shape, Qwen) else "LlavaOnevision"
    return getattr(transformers, f"{family}ForConditionalGeneration")


def _fill(hf: Any, text: Text, place: Placement, dtype: torch.dtype, weights: str, ranks: ProcessGroup) -> None:
    """Every parameter, module by module; a linear map of the text part is stored as `weights` says before the next is made."""
    core = hf.model.language_model
    stored: set[int] = set()
    if weights != "bf16":
        stored = {id(m) for m in core.layers.modules() if isinstance(m, nn.Linear)} | {id(hf.lm_head)}

    def normal(name: str, like: Tensor, std: float) -> nn.Parameter:
        share, device = local_shard(like), place.of(name)
        generators = place.common if share is like else place.mine
        new = torch.empty(share.shape, device=device, dtype=dtype).normal_(0, std, generator=generators[device])
        return nn.Parameter(as_share(like, new), requires_grad=False)

    # The head comes last, since it is made of the embedding.
    ordered = [(name, m) for name, m in hf.named_modules() if m is not hf.lm_head]
    for name, module in ordered:
        for key, old in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if old.ndim == 1:
                new = normal(full, old, 0.02)
                if key == "weight":
                    new.data.fill_(1)
            elif isinstance(module, nn.Embedding):
                new = normal(full, old, 1.0)
            else:
                fan_in = math.prod(old.shape[1:])
                depth = math.sqrt(2 * text.layers) if name.endswith(("o_proj", "down_proj")) else 1.0
                new = normal(full, old, 1 / math.sqrt(fan_in) / depth)
            setattr(module, key, new)
        if id(module) in stored:
            _store(hf, name, module, weights, ranks)
    embedding = core.embed_tokens.weight
    # A tied head cannot be scaled without the embedding; its logits are only larger.
    head = embedding
    if not text.tied:
        rows = embedding.roll(1, 0).mul_(text.width**-0.5)
        count, there = len(local_shard(hf.lm_head.weight)), place.of("lm_head")
        first = place.rank * count if count < text.vocabulary else 0
        head = nn.Parameter(as_share(hf.lm_head.weight, rows[first : first + count].to(there, copy=True)), requires_grad=False)
    hf.lm_head.weight = head
    if id(hf.lm_head) in stored:
        _store(hf, "lm_head", hf.lm_head, weights, ranks)


def _store(hf: Any, name: str, linear: nn.Linear, weights: str, ranks: ProcessGroup) -> None:
    parent, _, key = name.rpartition(".")
    stored = quantize(linear, weights) if ranks.size == 1 else quantize_share(linear, weights, key, ranks)
    setattr(hf.get_submodule(parent), key, stored)
    linear.weight = None  # the walk still holds the module


def _buffers(hf: Any, shape: Qwen | Llava, place: Placement) -> None:
    """Rotary frequencies and the like, which no checkpoint holds: taken from a model of the same config, one layer deep."""
    config = shape.config()
    text, vision = config.get_text_config(), config.vision_config
    text.vocab_size, text.num_hidden_layers, text.intermediate_size = 8, 1, 8
    text.layer_types, text.pad_token_id = ["full_attention"], None
    vision.intermediate_size = 8
    setattr(vision, "depth" if isinstance(shape, Qwen) else "num_hidden_layers", 1)
    known = dict(model_class(shape)(config).named_buffers())
    for name, buffer in list(hf.named_buffers()):
        if buffer.is_meta:
            parent, _, key = name.rpartition(".")
            setattr(hf.get_submodule(parent), key, known[name].to(place.of(name)))
