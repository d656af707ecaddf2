"""Checkpoint folders of tiny random models of the newer families, and requests to them. Nothing of specvlm is imported.

Each family has a target, a draft (the target with noise) and a smaller draft.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ASSETS = Path(__file__).parents[1] / "specvlm" / "assets" / "qwen2_5_vl" / "target"
QUESTION = "describe the video ."
# Frames, height, width and frames per second of each video; height and width of each image.
REQUESTS: dict[str, tuple[list[tuple[int, int, int, float]], list[tuple[int, int]]]] = {
    "text": ([], []),
    "image": ([], [(90, 120)]),
    "images": ([], [(90, 120), (60, 150)]),
    "video": ([(6, 96, 128, 2.0)], []),
    "odd frames": ([(5, 70, 150, 1.5)], []),
    "two videos": ([(6, 96, 128, 2.0), (4, 64, 80, 0.4)], []),
    "mixed": ([(6, 96, 128, 2.0)], [(90, 120)]),
}
# Turns of a role and its parts: a text, or the size of a video or of an image.
CHATS: dict[str, list[tuple[str, list[Any]]]] = {
    "question first": [("user", [QUESTION, (6, 96, 128, 2.0)])],
    "interleaved": [
        ("user", ["first", (6, 64, 80, 0.4), "then", (90, 120), "and", (6, 96, 128, 2.0), "which ?", (60, 150), QUESTION])
    ],
    "earlier turns": [
        ("system", ["answer with one word ."]),
        ("user", [(6, 96, 128, 2.0), "how many objects appear ?"]),
        ("assistant", ["two ."]),
        ("user", ["and in the picture", (90, 120), "?"]),
    ],
}
STILL = (96, 160)  # height and width of a video in which only a corner moves
UNEQUAL = {"still": ([(6, *STILL, 2.0)], []), "two of them": ([(4, *STILL, 0.4), (6, *STILL, 2.0)], [(90, 120)])}
ONE = ([(1, 50, 130, 2.0)], [])
STACKED = {"two videos": ([(6, 96, 128, 2.0), (6, 64, 80, 0.4)], [])}  # instead, where Hugging Face stacks the videos
UNLIKE = STACKED | {"unlike videos": REQUESTS["two videos"], "one frame": ONE}
TEXT = dict(
    intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.2,
    vocab_size=192, bos_token_id=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
IDS = dict(image_token_id=7, video_token_id=6, vision_start_token_id=4, vision_end_token_id=5, tie_word_embeddings=False)
INTERNVL_IMAGE = 157  # "<IMG_CONTEXT>" in the tokenizer that `write_internvl` makes
PIXELS = dict(do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3, rescale_factor=1 / 255)
QWEN3 = PIXELS | dict(
    processor_class="Qwen3VLProcessor", image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16, temporal_patch_size=2,
    merge_size=2,
)  # fmt: skip
QWEN3_FILES = {
    "video_preprocessor_config.json": QWEN3 | {
        "video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "min_frames": 4, "max_frames": 768,
        "size": {"shortest_edge": 4096, "longest_edge": 16 * 128 * 128}, "cap_pixels_per_frame": False,
    },
    "preprocessor_config.json": QWEN3 | {
        "image_processor_type": "Qwen2VLImageProcessorFast", "size": {"shortest_edge": 4096, "longest_edge": 128 * 128},
    },
}  # fmt: skip


def qwen3_vl(small: bool = False, moe: bool = False) -> Any:
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    hidden, levels = (32, [1]) if small else (64, [0, 1, 2])
    rope = dict(rope_type="default", rope_theta=5000.0, mrope_section=[4, 4, 4], mrope_interleaved=True)
    text = TEXT | dict(hidden_size=hidden, num_hidden_layers=2 if small else 4, head_dim=24, rope_parameters=rope)
    vision = dict(
        depth=4, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=hidden, num_position_embeddings=64, deepstack_visual_indexes=levels, initializer_range=0.2,
    )  # fmt: skip
    if moe:
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[])
        return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **IDS))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))


def write_qwen3(folder: Path) -> None:
    write_tokenizer(folder, ["<", ">", "seconds", *map(str, range(41))])
    for name, content in QWEN3_FILES.items():
        (folder / name).write_text(json.dumps(content))


def write_tokenizer(folder: Path, words: list[str], special: Sequence[str] = ()) -> None:
    """Copy the embedded pair's tokenizer and chat template, and add words and special tokens."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((ASSETS / name).read_text())
    content = json.loads((ASSETS / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    for word in special:
        vocabulary[word] = len(vocabulary)
        content["added_tokens"].append(content["added_tokens"][0] | {"id": vocabulary[word], "content": word})
    assert len(vocabulary) <= TEXT["vocab_size"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def internvl(small: bool = False) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    hidden = 32 if small else 64
    rope = dict(rope_type="default", rope_theta=5000.0)
    text = TEXT | dict(model_type="qwen2", hidden_size=hidden, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, attention_bias=True, intermediate_size=64,
        image_size=[56, 56], patch_size=[14, 14], initializer_range=0.2,
    )  # fmt: skip
    more = dict(image_token_id=INTERNVL_IMAGE, image_seq_length=4, downsample_ratio=0.5, tie_word_embeddings=False)
    return InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision, **more))


def write_internvl(folder: Path) -> None:
    write_tokenizer(folder, [":", *(f"frame{number}" for number in range(1, 25))], ["<img>", "</img>", "<IMG_CONTEXT>"])
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True))
    change(folder / "tokenizer_config.json", lambda content: content.update(extra_special_tokens=tokens))
    template = (ASSETS / "chat_template.jinja").read_text()
    for pad, mark in (("video_pad", "<video>"), ("image_pad", "<IMG_CONTEXT>")):
        template = template.replace(f"<|vision_start|><|{pad}|><|vision_end|>", f"{mark}\n")
    (folder / "chat_template.jinja").write_text(template)
    size = PIXELS | dict(
        processor_class="InternVLProcessor", image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        size={"height": 56, "width": 56},
    )  # fmt: skip
    image = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    files = {
        "video_preprocessor_config.json": size | {"video_processor_type": "InternVLVideoProcessor"},
        "preprocessor_config.json": size | image,
        "processor_config.json": {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def qwen2_vl(small: bool = False) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    hidden = 32 if small else 64
    rope = dict(rope_type="default", rope_theta=5000.0, mrope_section=[1, 1, 2] if small else [2, 3, 3])
    text = TEXT | dict(hidden_size=hidden, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = dict(
        depth=3, embed_dim=32, hidden_size=hidden, num_heads=2, mlp_ratio=2, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **IDS))


def write_qwen2(folder: Path) -> None:
    write_tokenizer(folder, [])
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        content = json.loads((ASSETS / name).read_text())
        content |= {"processor_class": "Qwen2VLProcessor", "size": {"shortest_edge": 3136, "longest_edge": 12544}}
        for bound in ("min_pixels", "max_pixels"):
            content.pop(bound, None)
        (folder / name).write_text(json.dumps(content))


def video_llama_3(small: bool = False) -> Any:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    hidden = 32 if small else 64
    rope = dict(rope_type="default", rope_theta=5000.0)
    text = TEXT | dict(model_type="qwen2", hidden_size=hidden, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = dict(
        model_type="video_llama_3_vision", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        patch_size=14, initializer_range=0.2,
    )  # fmt: skip
    ids = {name: IDS[name] for name in ("image_token_id", "video_token_id", "tie_word_embeddings")}
    return VideoLlama3ForConditionalGeneration(VideoLlama3Config(text_config=text, vision_config=vision, **ids))


def write_video_llama_3(folder: Path) -> None:
    write_tokenizer(folder, ["time", ":", *map(str, range(31)), *(f"{digit}s" for digit in range(10))])
    size = PIXELS | dict(
        processor_class="VideoLlama3Processor", image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=14, temporal_patch_size=1,
    )  # fmt: skip
    files = {
        "video_preprocessor_config.json": size | {
            "video_processor_type": "VideoLlama3VideoProcessor", "merge_size": 2, "use_token_compression": True, "fps": 1,
            "min_frames": 4, "max_frames": 12, "do_sample_frames": True, "return_metadata": True,
            "size": {"shortest_edge": 3136, "longest_edge": 75264},
        },
        "preprocessor_config.json": size | {
            "image_processor_type": "VideoLlama3ImageProcessor", "merge_size": 1,
            "size": {"shortest_edge": 784, "longest_edge": 7840},
        },
        "processor_config.json": {"processor_class": "VideoLlama3Processor"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def smolvlm(small: bool = False) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    hidden = 32 if small else 64
    rope = dict(rope_type="default", rope_theta=5000.0)
    text = TEXT | dict(model_type="llama", hidden_size=hidden, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=7,
        initializer_range=0.2,
    )  # fmt: skip
    more = dict(image_token_id=9, scale_factor=4, tie_word_embeddings=False)
    return SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=vision, **more))


def write_smolvlm(folder: Path) -> None:
    words = ["provided", "following", "series", "frames", "frame", "[", "]", "h", "mm", "ss", ":", "0"]
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    write_tokenizer(folder, [*words, *(f"{number:02d}" for number in range(18))], special)
    template = (ASSETS / "chat_template.jinja").read_text()  # its mark of a video is none: a chat with one has another template
    (folder / "chat_template.jinja").write_text(template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"))
    settings = PIXELS | dict(
        processor_class="SmolVLMProcessor", image_processor_type="SmolVLMImageProcessor", resample=1, do_pad=True,
        do_image_splitting=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"longest_edge": 112},
        max_image_size={"longest_edge": 56}, video_sampling={"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 56}},
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}))


def llava_next_video(small: bool = False) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    hidden = 32 if small else 64
    rope = dict(rope_type="default", rope_theta=5000.0)
    text = LlamaConfig(**TEXT, hidden_size=hidden, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14,
        initializer_range=0.2,
    )  # fmt: skip
    places = dict(image_token_index=7, video_token_index=6, tie_word_embeddings=False)
    points = dict(image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]], spatial_pool_stride=2)
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(vision_config=vision, text_config=text, **places, **points)
    )


def write_llava_next_video(folder: Path) -> None:
    write_tokenizer(folder, [])
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    size = PIXELS | dict(
        processor_class="LlavaNextVideoProcessor", image_mean=[0.481, 0.457, 0.408], image_std=[0.268, 0.261, 0.275],
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_center_crop=True,
    )  # fmt: skip
    points = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
    processor = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    files = {
        "video_preprocessor_config.json": size | {"video_processor_type": "LlavaNextVideoVideoProcessor"},
        "preprocessor_config.json": size | points | {"image_processor_type": "LlavaNextImageProcessor"},
        "processor_config.json": processor | tokens | {"processor_class": "LlavaNextVideoProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def glm4v(small: bool = False, moe: bool = False, newer: bool = False) -> Any:
    from transformers import (
        Glm4vConfig,
        Glm4vForConditionalGeneration,
        Glm4vMoeConfig,
        Glm4vMoeForConditionalGeneration,
        Glm46VConfig,
        Glm46VForConditionalGeneration,
    )

    hidden, heads = (32, 2) if small else (64, 4)
    rope = dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 2])
    text = TEXT | dict(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=2 if small else 4, rope_parameters=rope)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=hidden, num_heads=2, image_size=56, patch_size=14,
        initializer_range=0.1,
    )  # fmt: skip
    names = ("image_start_token_id", "image_end_token_id", "image_token_id", "video_start_token_id", "video_end_token_id")
    ids = dict(zip((*names, "video_token_id"), range(162, 168), strict=True))
    if moe:
        text |= dict(head_dim=16, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=2)
        text |= dict(n_group=2, topk_group=1, routed_scaling_factor=1.5)
        return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(text_config=text, vision_config=vision, **ids))
    if newer:
        settings = {
            "text_config": text | {"model_type": "glm4v_text"},
            "vision_config": vision | {"model_type": "glm4v_vision"},
        }
        return Glm46VForConditionalGeneration(Glm46VConfig(**settings, **ids))
    return Glm4vForConditionalGeneration(Glm4vConfig(text_config=text, vision_config=vision, **ids))


def write_glm4v(folder: Path, version: str = "Glm4v") -> None:
    marks = [f"<|{mark}|>" for mark in ("begin_of_image", "end_of_image", "image", "begin_of_video", "end_of_video", "video")]
    write_tokenizer(folder, [*map(str, range(31)), "seconds"], marks)
    template = (ASSETS / "chat_template.jinja").read_text()
    for kind in ("image", "video"):
        whole = f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>"
        template = template.replace(f"<|vision_start|><|{kind}_pad|><|vision_end|>", whole)
    (folder / "chat_template.jinja").write_text(template)
    size = PIXELS | dict(
        processor_class=f"{version}Processor", image_mean=[0.481, 0.457, 0.408], image_std=[0.268, 0.261, 0.275],
        patch_size=14, temporal_patch_size=2, merge_size=2,
    )  # fmt: skip
    video = {"size": {"shortest_edge": 3136, "longest_edge": 75264}, "fps": 2, "num_frames": 16, "max_duration": 300}
    files = {
        "video_preprocessor_config.json": size | video | {"video_processor_type": f"{version}VideoProcessor"},
        "preprocessor_config.json": size | {
            "image_processor_type": f"{version}ImageProcessor", "size": {"shortest_edge": 3136, "longest_edge": 25088},
        },
        "processor_config.json": {"processor_class": f"{version}Processor"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# How a family's model is built (small or not), and how its other files are written.
FAMILIES: dict[str, tuple[Callable[[bool], Any], Callable[[Path], None]]] = {
    "qwen3_vl": (qwen3_vl, write_qwen3),
    "qwen3_vl_moe": (lambda small: qwen3_vl(small, moe=not small), write_qwen3),  # its small draft is dense
    "internvl": (internvl, write_internvl),
    "qwen2_vl": (qwen2_vl, write_qwen2),
    "video_llama_3": (video_llama_3, write_video_llama_3),
    "smolvlm": (smolvlm, write_smolvlm),
    "llava_next_video": (llava_next_video, write_llava_next_video),
    "glm4v": (glm4v, write_glm4v),
    # Its small draft is dense, and of the older class, as GLM-4.6V-Flash.
    "glm4v_moe": (lambda small: glm4v(small, moe=not small), lambda folder: write_glm4v(folder, "Glm46V")),
    "glm46v": (lambda small: glm4v(small, newer=True), lambda folder: write_glm4v(folder, "Glm46V")),
}


def make(folder: Path, family: str) -> Path:
    """Write the three checkpoints of a family. Weights depend on nothing but the versions of the libraries."""
    build, write = FAMILIES[family]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        target, small = shaken(build(False)), shaken(build(True))
        draft = copy.deepcopy(target)
        for weight in draft.parameters():
            weight.data += 0.01 * torch.randn_like(weight)
    for name, hf in (("target", target), ("draft", draft), ("small", small)):
        hf.generation_config.update(eos_token_id=[3, 0], pad_token_id=0, do_sample=False)
        hf.save_pretrained(folder / name)
        write(folder / name)
    return folder


def shaken(hf: Any) -> Any:
    """Give biases and norms random values too: at their initial values, faults in them would not show."""
    for name, weight in hf.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.1)
        elif "norm" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    return hf


def requests(family: str) -> dict[str, tuple[list[tuple[int, int, int, float]], list[tuple[int, int]]]]:
    """Return the requests of a family. video_llama_3 leaves out patches that do not change."""
    more = {"internvl": STACKED, "llava_onevision": STACKED, "video_llama_3": UNEQUAL}
    more |= {"smolvlm": UNLIKE, "llava_next_video": UNLIKE}
    return REQUESTS | more.get(family, {})


def chat(name: str, video: Callable[..., Any], image: Callable[..., Any]) -> list[dict[str, Any]]:
    """Make a chat of CHATS. video, image: make what stands in its parts from the sizes."""

    def part(of: Any) -> dict[str, Any]:
        if isinstance(of, str):
            return {"type": "text", "text": of}
        return {"type": "image", "image": image(*of)} if len(of) == 2 else {"type": "video", "video": video(*of)}

    return [{"role": role, "content": [part(of) for of in parts]} for role, parts in CHATS[name]]


def frames(count: int, height: int, width: int) -> torch.Tensor:
    """(count, 3, height, width) uint8, the same on every machine: a moving gradient with integer noise."""
    place = torch.arange(count * 3 * height * width).view(count, 3, height, width)
    noise = (place * 1103515245 + 12345 >> 16) % 64
    ramp = (torch.arange(height)[:, None] * 2 + torch.arange(width) + 9 * torch.arange(count)[:, None, None]) % 192
    made = (ramp[:, None] + noise).to(torch.uint8)
    if (height, width) == STILL:
        made[:, :, 40:], made[:, :, :, 40:] = made[:1, :, 40:], made[:1, :, :, 40:]
    return made
