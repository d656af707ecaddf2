"""The tiny models: unforked Hugging Face classes, their sizes, and the files a checkpoint folder needs beside the weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from experiments.embedded_pair.layout import PATCH
from experiments.embedded_pair.tokenizer import END, ID, IMAGE, PAD, START, VIDEO, VOCAB_SIZE, build_tokenizer
from specvlm.video.synthetic import SIDE

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = ((0.5,) * 3, (0.5,) * 3)
MEAN_STD = {"qwen2_5_vl": (CLIP_MEAN, CLIP_STD), "llava_onevision": HALF, "qwen3_vl": HALF}


@dataclass(frozen=True)
class Size:
    """Widths and depths; text has 2 key heads, `mrope` splits half a head's width over time, row, column.

    head: Width of a text head, where the family gives it.
    deepstack: Vision layers whose features are added after the first text layers.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    mrope: tuple[int, int, int]
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    head: int = 0
    deepstack: tuple[int, ...] = ()


SIZES = {
    ("qwen2_5_vl", "target"): Size(192, 6, 4, 512, (8, 8, 8), 160, 4, 5, 352),
    ("qwen2_5_vl", "draft"): Size(128, 2, 4, 352, (6, 5, 5), 96, 3, 3, 176),
    ("llava_onevision", "target"): Size(192, 6, 4, 512, (8, 8, 8), 176, 4, 4, 640),
    ("llava_onevision", "draft"): Size(128, 2, 4, 352, (6, 5, 5), 96, 3, 3, 448),
    ("qwen3_vl", "target"): Size(192, 6, 4, 448, (12, 10, 10), 144, 4, 3, 384, 64, (0, 2)),
    ("qwen3_vl", "draft"): Size(128, 2, 4, 352, (6, 5, 5), 80, 3, 2, 224, 32, (1,)),
}


def _text_config(size: Size, rope: dict) -> dict:
    return dict(
        vocab_size=VOCAB_SIZE, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=2, max_position_embeddings=4096,
        rope_parameters=rope, bos_token_id=START, eos_token_id=END, pad_token_id=PAD, initializer_range=0.05,
        tie_word_embeddings=True, use_sliding_window=False, rms_norm_eps=1e-6,
    )  # fmt: skip


def _qwen(size: Size) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": list(size.mrope), "rope_theta": 1000.0}
    vision = dict(
        depth=size.vision_layers, hidden_size=size.vision_hidden, intermediate_size=size.vision_mlp,
        num_heads=size.vision_heads, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2, window_size=SIDE,
        fullatt_block_indexes=list(range(size.vision_layers)), out_hidden_size=size.hidden, tokens_per_second=1,
        initializer_range=0.04,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=_text_config(size, rope), vision_config=vision, image_token_id=ID[IMAGE["qwen2_5_vl"]],
        video_token_id=ID[VIDEO["qwen2_5_vl"]], vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3(size: Size) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": list(size.mrope), "mrope_interleaved": True, "rope_theta": 1000.0}
    vision = dict(
        depth=size.vision_layers, hidden_size=size.vision_hidden, intermediate_size=size.vision_mlp,
        num_heads=size.vision_heads, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2,
        num_position_embeddings=(SIDE // PATCH) ** 2, deepstack_visual_indexes=list(size.deepstack),
        out_hidden_size=size.hidden, initializer_range=0.04,
    )  # fmt: skip
    skipped = ("use_sliding_window", "bos_token_id", "eos_token_id")
    text = {name: value for name, value in _text_config(size, rope).items() if name not in skipped}
    config = Qwen3VLConfig(
        text_config=text | {"head_dim": size.head}, vision_config=vision, image_token_id=ID[IMAGE["qwen3_vl"]],
        video_token_id=ID[VIDEO["qwen3_vl"]], vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def _llava(size: Size) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    vision = dict(
        model_type="siglip_vision_model", hidden_size=size.vision_hidden, intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers, num_attention_heads=size.vision_heads, image_size=SIDE, patch_size=PATCH,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=dict(model_type="qwen2", **_text_config(size, rope)), vision_config=vision,
        image_token_index=ID[IMAGE["llava_onevision"]], video_token_index=ID[VIDEO["llava_onevision"]],
        image_grid_pinpoints=[[SIDE, SIDE]], tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def build(family: str, size: str, seed: int = 0) -> PreTrainedModel:
    """A model with fresh fp32 weights; `size` is target or draft."""
    torch.manual_seed(seed)
    model = {"qwen2_5_vl": _qwen, "llava_onevision": _llava, "qwen3_vl": _qwen3}[family](SIZES[family, size]).float()
    model.generation_config = GenerationConfig(eos_token_id=[END, PAD], pad_token_id=PAD, bos_token_id=START, do_sample=False)
    return model


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State without the tied head, under names that do not depend on the transformers version (SigLIP's nesting changed)."""
    return {name.replace(".vision_model.", "."): t for name, t in model.state_dict().items() if not name.startswith("lm_head")}


def load_weights(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """The inverse of `weights`; raises on a missing or unknown name."""
    names = {name.replace(".vision_model.", "."): name for name in model.state_dict() if not name.startswith("lm_head")}
    if names.keys() != state.keys():
        raise ValueError(f"weights do not fit: {sorted(names.keys() ^ state.keys())[:4]} ...")
    model.load_state_dict({names[n]: t.float() for n, t in state.items()}, strict=False)
    model.tie_weights()


def save_folder(model: PreTrainedModel, family: str, folder: Path) -> None:
    """A checkpoint folder as `from_pretrained` and the processors expect it; weights in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written 0600, which a packaged install cannot read
    build_tokenizer(family).save_pretrained(folder)
    mean, std = (list(v) for v in MEAN_STD[family])
    common = {"image_mean": mean, "image_std": std, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
              "do_normalize": True, "do_convert_rgb": True, "resample": 3}  # fmt: skip
    if family == "qwen2_5_vl":
        # One grid cell is 28 x 28 pixels; 224 x 224 is also the most a frame may have, because training saw no other size.
        image = common | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
                          "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2,
                          "min_pixels": 56 * 56, "max_pixels": SIDE * SIDE}  # fmt: skip
        video = {k: v for k, v in image.items() if k not in ("image_processor_type", "min_pixels", "max_pixels")}
        video |= {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2, "min_frames": 4, "max_frames": 32,
                  "size": {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}}  # fmt: skip
    elif family == "qwen3_vl":
        # Its bounds are those of a whole video. The tokens of a frame are bounded too, because training saw no other size.
        common |= {"processor_class": "Qwen3VLProcessor", "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        image = common | {"image_processor_type": "Qwen2VLImageProcessor",
                          "size": {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}}  # fmt: skip
        video = common | {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "min_frames": 4, "max_frames": 32,
                          "size": {"shortest_edge": 56 * 56, "longest_edge": 32 * SIDE * SIDE},
                          "cap_pixels_per_frame": True, "max_video_tokens": (SIDE // PATCH // 2) ** 2}  # fmt: skip
    else:
        size = {"height": SIDE, "width": SIDE}
        image = common | {"image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
                          "size": size, "image_grid_pinpoints": [[SIDE, SIDE]], "do_pad": True}  # fmt: skip
        video = common | {"video_processor_type": "LlavaOnevisionVideoProcessor", "processor_class": "LlavaOnevisionProcessor",
                          "size": size, "fps": 1}  # fmt: skip
        processor = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": (SIDE // PATCH) ** 2,
                     "vision_feature_select_strategy": "full"}  # fmt: skip
        (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    for name, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
