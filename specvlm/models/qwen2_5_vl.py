"""Qwen2.5-VL over Qwen2_5_VLForConditionalGeneration, with M-RoPE positions."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from specvlm.errors import UserError
from specvlm.models.processed import assembled, row_of
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.images import qwen_image
from specvlm.video.preprocess import QwenVideoConfig, qwen_video
from specvlm.video.settings import SamplingSettings
from specvlm.video.video import MAX_FRAMES, Clip, VideoInfo


class Qwen2_5_VL(VideoLM):
    """Qwen2.5-VL. Videos are {"pixels": (t*h*w, patch values), "thw": patch grid, "seconds": per temporal patch}."""

    family = "qwen2_5_vl"
    axes = 3

    @cached_property
    def _video_config(self) -> QwenVideoConfig:
        return QwenVideoConfig.from_folder(self.folder)

    @property
    def _merge(self) -> int:
        """Side of the square of patches that the tower merges into one token."""
        return int(self.hf.config.vision_config.spatial_merge_size)

    def check_settings(self) -> None:
        vision, ours = self.hf.config.vision_config, self._video_config
        sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        for name, its in zip(("patch_size", "merge_size", "temporal_patch_size"), sizes, strict=True):
            if getattr(ours, name) != its:
                raise UserError(f"{self.folder}: {name} is {getattr(ours, name)} for the processor and {its} for the model")

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Sample frames as the video processor does; at 2 frames per second if its settings give no rate or number.

        From a video with fewer than `num_frames`, takes all frames, less the last one if they are odd in number;
        Hugging Face raises an error.
        """
        settings = SamplingSettings.from_folder(self.folder, ("Qwen",))
        if settings.num_frames:
            return {"frames": min(settings.num_frames, info.frames // 2 * 2 or 1), "sampling": "qwen"}
        bounds = {"min_frames": settings.min_frames or 4, "max_frames": settings.max_frames or MAX_FRAMES}
        return {"fps": settings.fps or 2.0, **bounds, "sampling": "qwen"}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        config = self._video_config
        if max_pixels and max_pixels < config.min_pixels:
            raise UserError(f"max_pixels={max_pixels}: the checkpoint's frames have at least {config.min_pixels}")
        if max_pixels:
            config = replace(config, max_pixels=max_pixels)
        pixels, (t, h, w) = qwen_video(clip.frames, config)
        seconds = config.seconds_per_grid(clip.fps)
        return TokenGrid(t, h // self._merge, w // self._merge), {"pixels": pixels, "thw": (t, h, w), "seconds": seconds}

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        pixels, (t, h, w) = qwen_image(image, self.folder)
        return {"pixels": pixels, "thw": (t, h, w), "tokens": t * h * w // self._merge**2}

    def _tower(self, pixels: Tensor, thw: tuple[int, int, int], sight: VisionProbe | None = None) -> Any:
        """Run the vision tower on patches of a (t, h, w) grid; returns (t*h*w / merge², D) features.

        The starts of windows stay on the CPU, where every layer's attention reads them.
        """
        visual, grid = self.hf.model.visual, torch.tensor([thw])
        window_index, cu_window_seqlens = get_vision_window_index(grid, self._merge, visual.window_size, visual.patch_size)
        extra = {} if sight is None else {"sight": sight.of(visual.blocks[-1].attn)}
        out: Tensor = visual(
            pixels.to(self.device, visual.dtype),
            grid_thw=grid.to(self.device),
            cu_seqlens=get_vision_cu_seqlens(grid),
            window_index=window_index.to(self.device),
            cu_window_seqlens=cu_window_seqlens,
            **extra,
        ).pooler_output
        if sight is not None:  # patches of one token are adjacent, and tokens are in window order
            merged_NC = sight.take().unflatten(0, (-1, self._merge**2)).mean(1)
            sight.add(merged_NC[window_index.argsort().to(merged_NC.device)])
        return out

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        t, h, w = video["thw"]

        def encode(pixels_FPV: Tensor) -> Tensor:
            return self._tower(pixels_FPV.flatten(0, 1), (len(pixels_FPV), h, w), sight)

        return self.encode_frames(video["pixels"].unflatten(0, (t, h * w)), grid, h * w, frames, encode)

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        t, h, w = video["thw"]
        return t, h * w

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        return self._tower(image["pixels"], image["thw"])

    def _grids(self, prompt: VideoPrompt) -> dict[str, Tensor | None]:
        """Return patch grids and seconds per temporal patch, by the names of transformers' arguments."""
        return {
            "image_grid_thw": torch.tensor([i["thw"] for i in prompt.images]) if prompt.images else None,
            "video_grid_thw": torch.tensor([v["thw"] for v in prompt.videos]) if prompt.videos else None,
            "second_per_grid_ts": torch.tensor([v["seconds"] for v in prompt.videos]) if prompt.videos else None,
        }

    def _kinds(self, prompt: VideoPrompt) -> Tensor:
        """Return token types (1, S) for transformers' 3-D positions: 0 text, 1 image, 2 video."""
        return ((prompt.tokens == self.image_token) + 2 * (prompt.tokens == self.video_token))[None].int()

    def positions(self, prompt: VideoPrompt) -> Tensor:
        """Return M-RoPE positions (3, S). With mrope="hf" they are those of the installed transformers' release."""
        if self.mrope == "reference":
            return self._reference_positions(prompt)
        position_ids, _ = self.hf.model.get_rope_index(
            prompt.tokens[None], mm_token_type_ids=self._kinds(prompt), **self._grids(prompt)
        )
        return position_ids[:, 0]

    def _reference_positions(self, prompt: VideoPrompt) -> Tensor:
        """Compute positions by Qwen's own rule.

        A video's (t, h, w) count from the position after the text before it. Text continues after the largest of them.
        """
        kinds = self._kinds(prompt)[0]
        images, videos = iter(prompt.images), iter(prompt.videos)
        positions, slot, start = [], 0, 0
        while slot < len(prompt):
            kind = int(kinds[slot])
            if kind == 0:
                end = slot + int((kinds[slot:] != 0).int().argmax()) if (kinds[slot:] != 0).any() else len(prompt)
                block = (torch.arange(end - slot) + start).expand(3, -1)
            else:
                item = next(images if kind == 1 else videos)
                t, h, w = item["thw"]
                pace = float(item.get("seconds", 0.0)) * self.hf.config.vision_config.tokens_per_second if kind == 2 else 0.0
                axes = [(torch.arange(t) * pace).long(), torch.arange(h // self._merge), torch.arange(w // self._merge)]
                block = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
                end = slot + block.shape[1]
            positions.append(block)
            slot, start = end, int(block.max()) + 1
        return torch.cat(positions, 1)

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        tokens_1S, videos, images = prompt.tokens[None], prompt.videos, prompt.images
        made = {"input_ids": tokens_1S, "attention_mask": torch.ones_like(tokens_1S)}
        made["mm_token_type_ids"] = torch.zeros_like(tokens_1S, dtype=torch.int32)
        made["mm_token_type_ids"][0, tokens_1S[0] == config.image_token_id] = 1
        made["mm_token_type_ids"][0, tokens_1S[0] == config.video_token_id] = 2
        if videos:
            made["pixel_values_videos"] = torch.cat([video["pixels"] for video in videos])
            made["video_grid_thw"] = torch.tensor([video["thw"] for video in videos])
            made["second_per_grid_ts"] = torch.tensor([video["seconds"] for video in videos])
        if images:
            made["pixel_values"] = torch.cat([image["pixels"] for image in images])
            made["image_grid_thw"] = torch.tensor([image["thw"] for image in images])
        return made

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        made = frozenset({"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"})
        tokens_S = row_of(inputs, made)
        videos = parts_of(inputs.get("pixel_values_videos"), inputs.get("video_grid_thw"))
        images = parts_of(inputs.get("pixel_values"), inputs.get("image_grid_thw"))
        given = inputs.get("second_per_grid_ts")
        seconds = [1.0] * len(videos) if given is None else [float(number) for number in given]  # as get_rope_index does
        videos = [video | {"seconds": pace} for video, pace in zip(videos, seconds, strict=True)]
        sizes = [(t, h // self._merge, w // self._merge) for t, h, w in (item["thw"] for item in (*videos, *images))]
        images = [image | {"tokens": t * h * w} for image, (t, h, w) in zip(images, sizes[len(videos) :], strict=True)]
        slots = (self.video_token, self.image_token)
        return assembled(tokens_S, slots, [TokenGrid(*size) for size in sizes[: len(videos)]], videos, images)

    @classmethod
    def tiny(cls, text: dict[str, Any], ids: dict[str, int]) -> Any:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = dict(
            depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], out_hidden_size=text["hidden_size"],
            tokens_per_second=2, initializer_range=0.2,
        )  # fmt: skip
        text = text | {"rope_parameters": text["rope_parameters"] | {"mrope_section": [1, 1, 2]}}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        return Qwen2_5_VLForConditionalGeneration(config)

    @classmethod
    def tiny_video(cls, frames: int, generator: torch.Generator) -> tuple[TokenGrid, dict[str, Any]]:
        pixels = torch.randn(frames * 32, 96, generator=generator)
        return TokenGrid(frames, 4, 2), {"pixels": pixels, "thw": (frames, 8, 4), "seconds": 1.0}


def parts_of(pixels: Tensor | None, grids: Any) -> list[dict[str, Any]]:
    """Split the patches of all videos, or of all images, by their grids. Returns `pixels` and `thw` of each."""
    if pixels is None:
        return []
    sizes: list[tuple[int, int, int]] = [(int(t), int(h), int(w)) for t, h, w in grids]
    parts = pixels.cpu().split([t * h * w for t, h, w in sizes])
    return [{"pixels": part, "thw": size} for part, size in zip(parts, sizes, strict=True)]
