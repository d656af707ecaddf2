"""Qwen3-VL over Qwen3VLForConditionalGeneration: a run of tokens per frame after its timestamp, and DeepStack.

The timestamps follow the installed transformers' Qwen3VLProcessor. In 5.17 and 5.23 they are placed, with vision tags
around each frame, inside the vision tags of the chat template.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens

from specvlm.errors import UserError
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.vision_probe import VisionProbe
from specvlm.types import Features, TokenGrid, VideoPrompt
from specvlm.video.preprocess import Qwen3VideoConfig, qwen_video
from specvlm.video.settings import SamplingSettings
from specvlm.video.video import Clip, VideoInfo


class Qwen3VL(Qwen2_5_VL):
    """Qwen3-VL. Videos are {"pixels": (t*h*w, patch values), "thw": patch grid, "times": seconds of each frame}."""

    family = lineage = "qwen3_vl"

    @cached_property
    def _video_config(self) -> Qwen3VideoConfig:
        return Qwen3VideoConfig.from_folder(self.folder)

    @property
    def levels(self) -> int:
        return len(self.hf.config.vision_config.deepstack_visual_indexes)

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Sample frames as Qwen3VLVideoProcessor does, evenly, with the first and the last one.

        If the settings say nothing else, takes 2 frames per second, at least 4 and at most 768.
        """
        found = SamplingSettings.from_folder(self.folder, Qwen3VideoConfig.processors)
        wanted = found.num_frames or int(info.frames / info.fps * (found.fps or 2))
        if not found.num_frames:
            wanted = min(max(wanted, found.min_frames or 4), found.max_frames or 768)
        return {"frames": min(wanted, info.frames), "sampling": endpoints}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        config = self._video_config
        if max_pixels:
            config = replace(config, max_pixels=max_pixels * len(clip.frames))
        if config.max_pixels < config.min_pixels:
            raise UserError(f"max_pixels={max_pixels}: the checkpoint's videos have at least {config.min_pixels} pixels")
        pixels, (t, h, w) = qwen_video(clip.frames, config)
        seconds = [place / clip.source_fps for place in clip.index] or list(clip.times)
        group = config.temporal_patch_size
        seconds += seconds[-1:] * (-len(seconds) % group)
        times = [(first + last) / 2 for first, last in zip(seconds[::group], seconds[group - 1 :: group], strict=True)]
        return TokenGrid(t, h // self._merge, w // self._merge), {"pixels": pixels, "thw": (t, h, w), "times": times}

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        config = self.hf.config
        start, end = self.tokenizer.convert_ids_to_tokens([config.vision_start_token_id, config.vision_end_token_id])
        return "".join(f"<{time:.1f} seconds>{start}{self.marks[0]}{end}" for time in video["times"])

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        return [grid.per_frame] * grid.frames

    def _tower(self, pixels: Tensor, thw: tuple[int, int, int], sight: VisionProbe | None = None) -> Features:
        visual, grid = self.hf.model.visual, torch.tensor([thw])
        extra = {} if sight is None else {"sight": sight.of(visual.blocks[-1].attn)}
        cu_seqlens = get_vision_cu_seqlens(grid)
        out = visual(pixels.to(self.device, visual.dtype), grid_thw=grid.to(self.device), cu_seqlens=cu_seqlens, **extra)
        if sight is not None:  # patches of one token are adjacent
            sight.add(sight.take().unflatten(0, (-1, self._merge**2)).mean(1))
        return Features(out.pooler_output, torch.stack(list(out.deepstack_features), 1))

    def positions(self, prompt: VideoPrompt) -> Tensor:
        """Return M-RoPE positions (3, S). `mrope` has no effect: Hugging Face's rule is Qwen's own."""
        grids = {
            f"{name}_grid_thw": torch.tensor([item["thw"] for item in items]) if items else None
            for name, items in (("image", prompt.images), ("video", prompt.videos))
        }
        found, _ = self.hf.model.get_rope_index(prompt.tokens[None], mm_token_type_ids=self._kinds(prompt), **grids)
        return found[:, 0]

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        videos = tuple(video | {"seconds": 0.0} for video in prompt.videos)
        made = Qwen2_5_VL.hf_inputs(config, replace(prompt, videos=videos))
        return {name: value for name, value in made.items() if name != "second_per_grid_ts"}

    @classmethod
    def tiny(cls, text: dict[str, Any], ids: dict[str, int]) -> Any:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**tiny_settings(text), tie_word_embeddings=False, **ids))

    @classmethod
    def tiny_video(cls, frames: int, generator: torch.Generator) -> tuple[TokenGrid, dict[str, Any]]:
        grid, video = super().tiny_video(frames, generator)
        return grid, {"pixels": video["pixels"], "thw": video["thw"], "times": [0.5 * frame for frame in range(frames)]}


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with a mixture of experts. A dense Qwen3-VL may draft for it."""

    family = "qwen3_vl_moe"

    @classmethod
    def tiny(cls, text: dict[str, Any], ids: dict[str, int]) -> Any:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        made = tiny_settings(text)
        made["text_config"] |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=text["intermediate_size"])
        hf = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**made, tie_word_embeddings=False, **ids))
        hf.set_experts_implementation("eager")  # torch's grouped matmul has no float64
        return hf


def endpoints(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames, evenly from first to last; rounds as Qwen3VLVideoProcessor does, with numpy."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def tiny_settings(text: dict[str, Any]) -> dict[str, Any]:
    """Make the settings of a tiny model's language model and vision tower."""
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=text["hidden_size"], num_position_embeddings=16, deepstack_visual_indexes=[0, 1], initializer_range=0.2,
    )  # fmt: skip
    text = {name: value for name, value in text.items() if name not in ("use_sliding_window", "bos_token_id", "eos_token_id")}
    rope = {"mrope_section": [2, 1, 1]} | text["rope_parameters"]
    return {"text_config": {"head_dim": 8} | text | {"rope_parameters": rope}, "vision_config": vision}
