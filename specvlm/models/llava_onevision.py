"""LLaVA-OneVision over LlavaOnevisionForConditionalGeneration: 1-D positions, one newline token behind each video."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specvlm.data.preprocess import LlavaVideoConfig, llava_image, llava_video
from specvlm.data.settings import read_video_settings
from specvlm.data.video import Clip, VideoInfo
from specvlm.errors import UserError
from specvlm.models.video_lm import VideoLM
from specvlm.types import TokenGrid, VideoPrompt


class LlavaOneVision(VideoLM):
    """videos: {"pixels": (F, 3, height, width)}."""

    family = "llava_onevision"
    axes = 1

    @cached_property
    def _video_config(self) -> LlavaVideoConfig:
        return LlavaVideoConfig.from_folder(self.folder)

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """As its video processor's settings have it, else 32 frames, evenly spaced; never more than there are."""
        settings = read_video_settings(self.folder, ("Llava",))
        frames = int(settings.get("num_frames") or 32)
        if settings.get("fps") and info.duration * float(settings["fps"]) <= frames:
            return {"fps": float(settings["fps"])}
        return {"frames": min(frames, info.frames)}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        if max_pixels:
            raise UserError(f"max_pixels={max_pixels}: {self.family} takes frames of one size, there is nothing to limit")
        pixels = llava_video(clip.frames, self._video_config)
        return self.grid(len(pixels)), {"pixels": pixels}

    def grid(self, frames: int) -> TokenGrid:
        """The tower's patch grid halved on both sides, rounded up; the newline token counts as a video token."""
        vision = self.hf.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        return TokenGrid(frames, side, side, newline=1)

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        pixels, size, tokens = llava_image(image, self.folder, alone)
        return {"pixels": pixels, "size": size, "tokens": tokens}

    def encode_video(self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None) -> Tensor:
        core = self.hf.model

        def encode(pixels_F: Tensor) -> Tensor:
            out = core.get_video_features(pixels_F.to(self.device, self.dtype)[None]).pooler_output.flatten(0, -2)
            # transformers 5.23 appends the newline row to this output, 5.17 leaves that to its forward.
            return out[: len(pixels_F) * grid.per_frame]

        features = self._encode_frames(video["pixels"], grid, self.frame_patches(video)[1], frames, encode)
        return torch.cat([features, core.image_newline.to(self.dtype)[None]])

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        vision = self.hf.config.vision_config
        return len(video["pixels"]), int(vision.image_size // vision.patch_size) ** 2

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        pixels = image["pixels"].to(self.device, self.dtype)
        shared = {"batch_num_images": torch.tensor([2])} if len(pixels) == 1 else {}  # one tile: not the only image
        out = self.hf.model.get_image_features(pixels[None], torch.tensor([image["size"]], device=self.device), **shared)
        return torch.cat(list(out.pooler_output))

    def positions(self, prompt: VideoPrompt) -> Tensor:
        return torch.arange(len(prompt))[None]

    def generate_inputs(self, prompt: VideoPrompt) -> dict[str, Any]:
        inputs = {"input_ids": prompt.tokens[None].to(self.device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.videos:
            inputs["pixel_values_videos"] = torch.stack([v["pixels"] for v in prompt.videos]).to(self.device, self.dtype)
        if prompt.images:
            inputs["pixel_values"] = torch.stack([i["pixels"] for i in prompt.images]).to(self.device, self.dtype)
            if len(prompt.images) > 1:
                inputs["batch_num_images"] = torch.tensor([len(prompt.images)])
            inputs["image_sizes"] = torch.tensor([i["size"] for i in prompt.images], device=self.device)
        return inputs
