"""LLaVA-OneVision over LlavaOnevisionForConditionalGeneration: 1-D positions, one newline token after each video."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from specvlm.errors import UserError
from specvlm.models.processed import assembled, row_of
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe, inputs_of, received
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.images import llava_image, llava_tokens
from specvlm.video.preprocess import LlavaVideoConfig, llava_video
from specvlm.video.settings import SamplingSettings
from specvlm.video.video import Clip, VideoInfo

FRAMES = 32  # frames per video, if the checkpoint sets no number


class LlavaOneVision(VideoLM):
    """LLaVA-OneVision. Videos are {"pixels": (F, 3, height, width)}."""

    family = "llava_onevision"
    axes = 1

    @cached_property
    def _video_config(self) -> LlavaVideoConfig:
        return LlavaVideoConfig.from_folder(self.folder)

    def check_settings(self) -> None:
        ours, side = self._video_config, self.hf.config.vision_config.image_size
        if (ours.height, ours.width) != (side, side):
            raise UserError(f"{self.folder}: frames are {ours.height}x{ours.width} for the processor, {side} for the model")

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Sample frames as the video processor does; by default 32, evenly spaced. Never more than the video has.

        If the settings give a rate, at most `max_frames` frames are taken, by default 32. Hugging Face sets no limit.
        """
        settings = SamplingSettings.from_folder(self.folder, ("Llava",))
        if settings.fps:
            return {"fps": settings.fps, "max_frames": settings.max_frames or FRAMES}
        return {"frames": min(settings.num_frames or FRAMES, info.frames)}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        if max_pixels:
            raise UserError(f"max_pixels={max_pixels}: {self.family} takes frames of one size, there is nothing to limit")
        pixels = llava_video(clip.frames, self._video_config)
        return self.grid(len(pixels)), {"pixels": pixels}

    def grid(self, frames: int) -> TokenGrid:
        """Return the token grid: the tower's patch grid halved on both sides and rounded up, plus the newline token."""
        vision = self.hf.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        return TokenGrid(frames, side, side, newline=1)

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        pixels, size, tokens = llava_image(image, self.folder, alone)
        return {"pixels": pixels, "size": size, "tokens": tokens}

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        core = self.hf.model

        def encode(pixels_F: Tensor) -> Tensor:
            with inputs_of(None if sight is None else self._last_attention) as entering:
                out = core.get_video_features(pixels_F.to(self.device, self.dtype)[None]).pooler_output.flatten(0, -2)
            if sight is not None:
                sight.add(self._seen(entering[0]))
            # transformers 5.23 appends the newline row to this output, 5.17 does so only in its forward.
            return out[: len(pixels_F) * grid.per_frame]

        features = self.encode_frames(video["pixels"], grid, self.frame_patches(video)[1], frames, encode)
        if sight is not None:
            sight.add_newlines(grid.newline)
        return torch.cat([features, core.image_newline.to(self.dtype)[None]])

    @property
    def _last_attention(self) -> Any:
        """Attention module of the last vision layer whose output the model uses."""
        core = self.hf.model
        layers = getattr(core.vision_tower, "vision_model", core.vision_tower).encoder.layers
        chosen = self.hf.config.vision_feature_layer
        state = chosen if isinstance(chosen, int) else chosen[-1]  # index of a hidden state; 0 enters the first layer
        return layers[max(0, (state if state >= 0 else len(layers) + 1 + state) - 1)].self_attn

    def _seen(self, hidden_FRD: Tensor) -> Tensor:
        """Return a row (F * P, C) per token: the attention that it receives, then its key.

        Both are averaged over heads, and pooled as the features are. hidden_FRD: what enters the attention.
        """
        module = self._last_attention
        query, key = (
            x(hidden_FRD).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (module.q_proj, module.k_proj)
        )
        received_FR = received(query, key, float(module.scale))
        seen_FRC = torch.cat([received_FR[..., None], key.to(received_FR.dtype).mean(1)], -1)
        side = math.isqrt(seen_FRC.shape[1])
        seen_FRC = seen_FRC[:, seen_FRC.shape[1] - side**2 :]  # drop the class token in front, if any
        pooled = interpolate(seen_FRC.mT.unflatten(2, (side, side)), size=[math.ceil(side / 2)] * 2, mode="bilinear")
        return pooled.flatten(2).mT.flatten(0, 1)

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        vision = self.hf.config.vision_config
        return len(video["pixels"]), int(vision.image_size // vision.patch_size) ** 2

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        pixels = image["pixels"].to(self.device, self.dtype)
        shared = {"batch_num_images": torch.tensor([2])} if len(pixels) == 1 else {}  # one tile: not the only image
        out = self.hf.model.get_image_features(pixels[None], torch.tensor([image["size"]], device=self.device), **shared)
        return torch.cat(list(out.pooler_output))

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        made = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        if prompt.videos:
            made["pixel_values_videos"] = torch.stack([v["pixels"] for v in prompt.videos])
        if prompt.images:
            made["pixel_values"] = torch.stack([i["pixels"] for i in prompt.images])
            if len(prompt.images) > 1:
                made["batch_num_images"] = torch.tensor([len(prompt.images)])
            made["image_sizes"] = torch.tensor([i["size"] for i in prompt.images])
        return made

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        made = frozenset({"pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos"})
        tokens_S, config = row_of(inputs, made), self.hf.config
        clips, tiles, sizes = (inputs.get(name) for name in ("pixel_values_videos", "pixel_values", "image_sizes"))
        videos = [] if clips is None else [{"pixels": pixels.cpu()} for pixels in clips]
        images, side = [], int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        given = [] if tiles is None or sizes is None else list(zip(tiles, sizes, strict=True))
        for pixels, size in given:
            height, width = map(int, size)
            alone = len(given) == 1
            tokens = llava_tokens((height, width), config) if alone else side**2 + 1
            images.append({"pixels": pixels.cpu() if alone else pixels[:1].cpu(), "size": (height, width), "tokens": tokens})
        slots = (self.video_token, self.image_token)
        return assembled(tokens_S, slots, [self.grid(len(video["pixels"])) for video in videos], videos, images)

    @classmethod
    def tiny(cls, text: dict[str, Any], ids: dict[str, int]) -> Any:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

        vision = SiglipVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4,
            initializer_range=0.2,
        )  # fmt: skip
        config = LlavaOnevisionConfig(
            text_config=Qwen2Config(**text),
            vision_config=vision,
            image_token_id=ids["image_token_id"],
            video_token_id=ids["video_token_id"],
            image_grid_pinpoints=[[20, 20], [20, 40], [40, 20]],
            tie_word_embeddings=False,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return LlavaOnevisionForConditionalGeneration(config)

    @classmethod
    def tiny_video(cls, frames: int, generator: torch.Generator) -> tuple[TokenGrid, dict[str, Any]]:
        return TokenGrid(frames, 3, 3, newline=1), {"pixels": torch.randn(frames, 3, 20, 20, generator=generator)}
