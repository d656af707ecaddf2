"""Published model shapes, and models of these shapes with random weights, built on the device layer by layer.

Sizes are those of the released config.json files. Weights are normal with standard deviation 1/sqrt(fan-in), divided by
sqrt(2 * layers) for layers that write to the residual stream; norms are one. The head of an untied model is its
embedding rolled by one row, so that token v + 1 follows token v by a margin of many standard deviations. Neither
bfloat16 nor the order of summation can then change a greedy choice. Time and memory are as with real weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu_pair.packages import Glm4v, LlavaNextVideo, SmolVLM
from experiments.gpu_pair.spread import Placement, as_share, skeleton
from experiments.gpu_pair.text import Text
from specvlm.errors import UserError, did_you_mean
from specvlm.models import attention
from specvlm.models.layer_kinds import language_model
from specvlm.models.padding import pad_tower, pays
from specvlm.models.partition import Stage
from specvlm.models.quantize import quantize, quantize_share
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard
from specvlm.types import TokenGrid, VideoPrompt


@dataclass(frozen=True)
class Qwen:
    """Shape of a Qwen2.5-VL. vision_mlp: 3420, or 3456 in the 32B. small: tiny vision tower, for tests."""

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
        """Make a video of about `tokens` tokens: temporal patches of 16 x 16 tokens (448 x 448 pixels)."""
        side, patch = (2, 4) if self.small else (16, 14)
        frames = max(1, round(tokens / side**2))
        pixels = None
        if generator is not None:
            pixels = torch.randn(frames * 4 * side**2, 3 * 2 * patch**2, generator=generator)
        return TokenGrid(frames, side, side), {"pixels": pixels, "thw": (frames, 2 * side, 2 * side), "seconds": 1.0}


@dataclass(frozen=True)
class Qwen3:
    """Shape of a Qwen3-VL, also with experts. tower: layers, width and MLP of the vision tower. small: for tests."""

    text: Text
    tower: tuple[int, int, int] = (27, 1152, 4304)
    deepstack: tuple[int, ...] = (8, 16, 24)
    small: bool = False

    @property
    def family(self) -> str:
        """Name of the model family."""
        return "qwen3_vl_moe" if self.text.experts else "qwen3_vl"

    def config(self) -> Any:
        from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

        depth, width, mlp = self.tower
        vision: dict[str, Any] = dict(
            depth=depth, hidden_size=width, intermediate_size=mlp, num_heads=16, patch_size=16, spatial_merge_size=2,
            temporal_patch_size=2, num_position_embeddings=2304, deepstack_visual_indexes=list(self.deepstack),
        )  # fmt: skip
        sections, theta, ids, head_dim = [24, 20, 20], 5e6, (151655, 151656, 151652, 151653), 128
        if self.small:
            vision |= dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4)
            vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
            sections, theta, ids, head_dim = [2, 1, 1], 1e3, (1, 2, 3, 4), 8
        rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": theta}
        text = self.text.config(rope_parameters=rope, head_dim=head_dim)
        if self.text.experts:
            names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
            text |= dict(zip(names, self.text.experts, strict=True))
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return (Qwen3VLMoeConfig if self.text.experts else Qwen3VLConfig)(
            text_config={k: v for k, v in text.items() if k not in ("use_sliding_window", "max_window_layers")},
            vision_config=vision | {"out_hidden_size": self.text.width},
            tie_word_embeddings=self.text.tied,
            **dict(zip(names, ids, strict=True)),
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Make a video of about `tokens` tokens: temporal patches of 16 x 16 tokens (512 x 512 pixels)."""
        side, patch = (2, 4) if self.small else (16, 16)
        frames = max(1, round(tokens / side**2))
        pixels = None
        if generator is not None:
            pixels = torch.randn(frames * 4 * side**2, 3 * 2 * patch**2, generator=generator)
        times = [float(frame) for frame in range(frames)]
        return TokenGrid(frames, side, side), {"pixels": pixels, "thw": (frames, 2 * side, 2 * side), "times": times}


@dataclass(frozen=True)
class Llava:
    """Shape of a LLaVA-OneVision: SigLIP so400m at 384 pixels, a projector of two layers, Qwen2."""

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
        """Make a video of about `tokens` tokens: frames of 14 x 14 tokens, and a newline token after the last."""
        side, pixel = (3, 20) if self.small else (14, 384)
        frames = max(1, round(tokens / side**2))
        pixels = None if generator is None else torch.randn(frames, 3, pixel, pixel, generator=generator)
        return TokenGrid(frames, side, side, newline=1), {"pixels": pixels}


Shape = Qwen | Qwen3 | Llava | Glm4v | SmolVLM | LlavaNextVideo
QWEN_3B = Qwen(Text(36, 2048, 16, 2, 11008, 151936, tied=True))
QWEN_7B = Qwen(Text(28, 3584, 28, 4, 18944, 152064))
QWEN_32B = Qwen(Text(64, 5120, 40, 8, 27648, 152064), vision_mlp=3456)
LLAVA_7B = Llava(Text(28, 3584, 28, 4, 18944, 152000))
LLAVA_72B = Llava(Text(80, 8192, 64, 8, 29568, 152000))
QWEN3_2B = Qwen3(Text(28, 2048, 16, 8, 6144, 151936, tied=True), (24, 1024, 4096), (5, 11, 17))
QWEN3_4B = Qwen3(Text(36, 2560, 32, 8, 9728, 151936, tied=True), (24, 1024, 4096), (5, 11, 17))
QWEN3_32B = Qwen3(Text(64, 5120, 64, 8, 25600, 151936))
QWEN3_30B_A3B = Qwen3(Text(48, 2048, 32, 4, 6144, 151936, experts=(128, 8, 768)))
SMOL_500M = SmolVLM(Text(32, 960, 15, 5, 2560, 49280))
SMOL_256M = SmolVLM(Text(30, 576, 9, 3, 1536, 49280))
LLAVA_NEXT_7B = LlavaNextVideo(Text(32, 4096, 32, 32, 11008, 32064))
GLM4V_9B = Glm4v(Text(40, 4096, 32, 2, 13696, 151552))
TINY, TINY_DRAFT = Text(3, 32, 4, 2, 64, 997), Text(2, 32, 4, 2, 64, 997, tied=True)


@dataclass(frozen=True)
class Pair:
    """Target and draft. draft None: the target drafts for itself. target_weights: the target's default storage."""

    target: Shape
    draft: Shape | None
    target_weights: str = "bf16"


SHAPES = {
    "qwen2_5_vl_32b_7b": Pair(QWEN_32B, QWEN_7B),
    "qwen2_5_vl_32b_3b": Pair(QWEN_32B, QWEN_3B),
    "qwen2_5_vl_7b_3b": Pair(QWEN_7B, QWEN_3B),
    "qwen2_5_vl_7b_self": Pair(QWEN_7B, None),
    "llava_onevision_72b_7b": Pair(LLAVA_72B, LLAVA_7B, "fp8"),
    "qwen3_vl_32b_4b": Pair(QWEN3_32B, QWEN3_4B),
    "qwen3_vl_30b_a3b_2b": Pair(QWEN3_30B_A3B, QWEN3_2B),
    "smolvlm2_500m_256m": Pair(SMOL_500M, SMOL_256M),
    "llava_next_video_7b_self": Pair(LLAVA_NEXT_7B, None),
    "glm4_1v_9b_self": Pair(GLM4V_9B, None),
    "tiny": Pair(Qwen(TINY, small=True), Qwen(TINY_DRAFT, small=True)),
    "tiny_self": Pair(Qwen(TINY, small=True), None),
    "tiny_llava": Pair(Llava(TINY, small=True), Llava(TINY_DRAFT, small=True)),
    "tiny_smolvlm2": Pair(SmolVLM(TINY, small=True), SmolVLM(TINY_DRAFT, small=True)),
    "tiny_llava_next": Pair(LlavaNextVideo(TINY, small=True), LlavaNextVideo(TINY_DRAFT, small=True)),
    "tiny_glm4v": Pair(Glm4v(TINY, small=True), Glm4v(TINY_DRAFT, small=True)),
    "tiny_qwen3": Pair(Qwen3(TINY, small=True), Qwen3(TINY_DRAFT, small=True)),
    "tiny_experts": Pair(Qwen3(replace(TINY, experts=(4, 2, 64)), small=True), Qwen3(TINY_DRAFT, small=True)),
}


def pair_of(name: str) -> Pair:
    """Look up a pair. Raises UserError for an unknown name."""
    if name not in SHAPES:
        raise UserError(f"shape={name}: there is {', '.join(SHAPES)}.{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def prompt_of(lm: VideoLM, shape: Shape, tokens: int, pixels: bool, seed: int = 0) -> VideoPrompt:
    """Make a prompt of ten text tokens, a video of about `tokens` tokens, and fifty text tokens.

    If each frame has a run of tokens of its own, eight text tokens stand before it, as a timestamp would.

    pixels: Whether the video has pixels. Prefilling one without is free (see models.py).
    """
    generator = torch.Generator().manual_seed(seed)
    grid, video = shape.video(tokens, generator if pixels else None)
    words = torch.randint(10, min(lm.vocabulary // 2, 100_000), (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    runs = [lm.video_token]
    if len(lm.runs(grid, video)) > 1:
        runs = [token for frame in range(grid.frames) for token in (*words[frame % 40 : frame % 40 + 8], lm.video_token)]
    return lm.expand([*words[:10], *runs, *words[10:]], [grid], [video])


def build(
    shape: Shape,
    wrap: Callable[..., VideoLM],
    device: torch.device,
    dtype: torch.dtype,
    weights: str = "bf16",
    seed: int = 0,
    stages: Sequence[Stage] = (),
    ranks: ProcessGroup = SINGLE,
) -> VideoLM:
    """Build a model with random weights.

    Args:
        shape: Its shape.
        wrap: VideoLM class to wrap it in.
        device: Its device, unless `stages` are given.
        dtype: Dtype of its weights.
        weights: "bf16" keeps `dtype`. fp8, int8 or int4 quantise the text model layer by layer, so that it never exists
            as a whole in `dtype`.
        seed: Of the random weights.
        stages: Pipeline stages. Each layer is created on its own device.
        ranks: Tensor-parallel ranks. Each creates only its own shards.

    Returns:
        The model.
    """
    attention.register()
    hf = skeleton(model_class(shape), shape.config(), ranks)
    place = Placement(hf, stages or [Stage(device, 0, shape.text.layers)], seed, ranks.rank)
    _fill(hf, shape.text, place, dtype, weights, ranks)
    _buffers(hf, shape, place)
    left = [name for name, tensor in [*hf.named_parameters(), *hf.named_buffers()] if local_shard(tensor).is_meta]
    assert not left, left
    hf.set_attn_implementation(attention.IMPLEMENTATIONS)
    if pays(dtype, device):
        pad_tower(hf)
    return wrap(hf, stages=stages or None, ranks=ranks)


def model_class(shape: Shape) -> Any:
    """Return the Hugging Face model class of a shape."""
    import transformers

    names = {
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
        "qwen3_vl_moe": "Qwen3VLMoe",
        "llava_onevision": "LlavaOnevision",
        "smolvlm": "SmolVLM",
        "llava_next_video": "LlavaNextVideo",
        "glm4v": "Glm4v",
    }
    family = names[shape.family]
    return getattr(transformers, f"{family}ForConditionalGeneration")


def _fill(hf: Any, text: Text, place: Placement, dtype: torch.dtype, weights: str, ranks: ProcessGroup) -> None:
    """Create all parameters, module by module. Quantise each linear layer of the text model before the next."""
    core = language_model(hf)
    stored: set[int] = set()
    if weights != "bf16":
        stored = {id(m) for m in core.layers.modules() if isinstance(m, nn.Linear)} | {id(hf.lm_head)}

    def normal(name: str, like: Tensor, std: float) -> nn.Parameter:
        share, device = local_shard(like), place.of(name)
        generators = place.common if share is like else place.mine
        new = torch.empty(share.shape, device=device, dtype=dtype).normal_(0, std, generator=generators[device])
        return nn.Parameter(as_share(like, new), requires_grad=False)

    # The head comes last, since it is made from the embedding.
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
                experts = name.endswith(".experts")
                fan_in = old.shape[-1] if experts else math.prod(old.shape[1:])
                last = name.endswith(("o_proj", "down_proj")) or (experts and key == "down_proj")
                depth = math.sqrt(2 * text.layers) if last else 1.0
                new = normal(full, old, 1 / math.sqrt(fan_in) / depth)
            setattr(module, key, new)
        if id(module) in stored:
            _store(hf, name, module, weights, ranks)
    embedding = core.embed_tokens.weight
    # Do not scale a tied head: that would scale the embedding too. Its logits are larger, which does no harm.
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
    """Replace a linear layer by a quantised one."""
    parent, _, key = name.rpartition(".")
    stored = quantize(linear, weights) if ranks.size == 1 else quantize_share(linear, weights, key, ranks)
    setattr(hf.get_submodule(parent), key, stored)
    linear.weight = None  # free it: the loop still holds the module


def _buffers(hf: Any, shape: Shape, place: Placement) -> None:
    """Fill buffers that checkpoints lack, such as rotary frequencies, from a one-layer model of the same config."""
    config = shape.config()
    text, vision = config.get_text_config(), config.vision_config
    text.vocab_size, text.num_hidden_layers, text.intermediate_size = 8, 1, 8
    text.layer_types, text.pad_token_id = ["full_attention"], None
    vision.intermediate_size = 8
    if shape.text.experts:
        text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size = 1, 1, 8
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", 1)
    known = dict(model_class(shape)(config).named_buffers())
    for name, buffer in list(hf.named_buffers()):
        if buffer.is_meta:
            parent, _, key = name.rpartition(".")
            setattr(hf.get_submodule(parent), key, known[name].to(place.of(name)))
