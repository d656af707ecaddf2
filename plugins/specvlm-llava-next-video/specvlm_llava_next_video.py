"""LLaVA-NeXT-Video for specvlm: LLaVA-OneVision with square crops of frames, its own pooling layer and no newline."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specvlm.errors import UserError
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.processed import assembled, row_of
from specvlm.models.vision_probe import VisionProbe, inputs_of, received
from specvlm.strategies.plugins import hookimpl
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.preprocess import CLIP_MEAN, CLIP_STD, normalization_of, normalized, resized
from specvlm.video.settings import read_video_settings
from specvlm.video.video import Clip

BATCH = 8  # frames resized at a time


@dataclass(frozen=True)
class LlavaNextVideoConfig:
    """How frames are resized (the shorter side), cropped and normalized; defaults of LlavaNextVideoVideoProcessor."""

    shortest: int = 224
    side: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    processors: ClassVar[tuple[str, ...]] = ("LlavaNext",)  # older checkpoints name only the image processor

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        found = read_video_settings(folder, cls.processors)
        size, crop = found.get("size") or {"shortest_edge": cls.shortest}, found.get("crop_size") or {}
        shortest = size.get("shortest_edge") if isinstance(size, dict) else None
        sides = {side for side in crop.values()} if isinstance(crop, dict) else {None}
        side = next(iter(sides), cls.side) if len(sides) < 2 else None
        if (
            type(shortest) is not int
            or type(side) is not int
            or not 1 <= side <= shortest
            or found.get("do_center_crop") is False
        ):
            raise UserError(
                f"{folder}: size={size} and crop_size={crop} of the video processor: expected a shortest_edge, and a square "
                "crop that is no larger"
            )
        return cls(shortest, side, **normalization_of(found))

    def crop(self, frames: Tensor) -> Tensor:
        """Preprocess (T, 3, H, W) uint8 frames."""
        height, width = frames.shape[2:]
        small, large = sorted((height, width))
        longer = int(self.shortest * large / small)
        tall, wide = (longer, self.shortest) if width <= height else (self.shortest, longer)
        top, left = (tall - self.side) // 2, (wide - self.side) // 2
        return normalized(resized(frames, (tall, wide))[:, :, top : top + self.side, left : left + self.side], self)


class LlavaNextVideo(LlavaOneVision):
    """LLaVA-NeXT-Video.

    Videos are {"pixels": (F, 3, side, side)}, images {"pixels": (tiles, 3, side, side), "size"}.
    """

    family = "llava_next_video"

    @cached_property
    def _video_config(self) -> LlavaNextVideoConfig:  # type: ignore[override]
        return LlavaNextVideoConfig.from_folder(self.folder)

    def check_settings(self) -> None:
        ours, side = self._video_config.side, self.hf.config.vision_config.image_size
        if ours != side:
            raise UserError(f"{self.folder}: frames are {ours}x{ours} for the processor, {side}x{side} for the model")

    # ---- pixels

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        if max_pixels:
            raise UserError(f"max_pixels={max_pixels}: {self.family} takes frames of one size, there is nothing to limit")
        pixels = torch.cat([self._video_config.crop(part) for part in clip.frames.split(BATCH)])
        return self.grid(len(pixels)), {"pixels": pixels}

    def grid(self, frames: int) -> TokenGrid:
        """Return the token grid: squares of patches, pooled. Patches that do not fill a square are left out."""
        vision = self.hf.config.vision_config
        side = vision.image_size // vision.patch_size // self.hf.config.spatial_pool_stride
        return TokenGrid(frames, side, side)

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        processor = LlavaNextImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        made = processor.preprocess(image.numpy(), input_data_format="channels_first", return_tensors="pt")
        size = (image.shape[1], image.shape[2])
        return {"pixels": made["pixel_values"][0], "size": size, "tokens": image_tokens(size, self.hf.config)}

    # ---- features

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        def encode(pixels_F: Tensor) -> Tensor:
            with inputs_of(None if sight is None else self._last_attention) as entering:
                found = self.hf.model.get_video_features(pixels_F.to(self.device, self.dtype)[None]).pooler_output
            if sight is not None:
                sight.add(self._seen(entering[0]))
            return torch.cat([part.flatten(0, -2) for part in found])  # one part, of a list in transformers 5.17

        return self.encode_frames(video["pixels"], grid, self.frame_patches(video)[1], frames, encode)

    def _seen(self, hidden_FRD: Tensor) -> Tensor:
        """(F * P, C) attention that each token receives, then its key: means over heads and the pooled patches."""
        module, stride = self._last_attention, int(self.hf.config.spatial_pool_stride)
        query, key = (
            x(hidden_FRD).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (module.q_proj, module.k_proj)
        )
        received_FR = received(query, key, float(module.scale))
        seen_FRC = torch.cat([received_FR[..., None], key.to(received_FR.dtype).mean(1)], -1)[:, 1:]  # the class token is first
        side = round(seen_FRC.shape[1] ** 0.5)
        whole = side // stride * stride
        seen_FHWC = seen_FRC.unflatten(1, (side, side))[:, :whole, :whole]
        return seen_FHWC.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).mean((2, 4)).flatten(0, 2)

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        sizes = torch.tensor([image["size"]], device=self.device)
        found = self.hf.model.get_image_features(image["pixels"].to(self.device, self.dtype)[None], sizes)
        return torch.cat(list(found.pooler_output))

    # ---- Hugging Face's own model

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        """Return the model's inputs. Videos of different lengths, which cannot be stacked, are passed as one video.

        That is equal, since the model encodes frames separately.
        """
        made = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        if prompt.videos:
            clips = [video["pixels"] for video in prompt.videos]
            alike = len({len(clip) for clip in clips}) == 1
            made["pixel_values_videos"] = torch.stack(clips) if alike else torch.cat(clips)[None]
        if prompt.images:
            made["pixel_values"] = pad_sequence([image["pixels"] for image in prompt.images], batch_first=True)
            made["image_sizes"] = torch.tensor([image["size"] for image in prompt.images])
        return made

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        tokens_S = row_of(inputs, frozenset({"pixel_values", "image_sizes", "pixel_values_videos"}))
        clips, tiles, sizes = (inputs.get(name) for name in ("pixel_values_videos", "pixel_values", "image_sizes"))
        videos = [] if clips is None else [{"pixels": pixels.cpu()} for pixels in clips]
        images = []
        for pixels, size in [] if tiles is None or sizes is None else zip(tiles, sizes, strict=True):
            height, width = map(int, size)
            count = image_tiles((height, width), self.hf.config)
            tokens = image_tokens((height, width), self.hf.config)
            images.append({"pixels": pixels[:count].cpu(), "size": (height, width), "tokens": tokens})
        slots = (self.video_token, self.image_token)
        return assembled(tokens_S, slots, [self.grid(len(video["pixels"])) for video in videos], videos, images)


def image_tiles(size: tuple[int, int], config: Any) -> int:
    """Count the tiles of an image: the whole, then its parts in the resolution that fits it best."""
    from transformers.models.llava_next_video.modeling_llava_next_video import image_size_to_num_patches

    return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def image_tokens(size: tuple[int, int], config: Any) -> int:
    """Count the tokens that LlavaNextVideoModel.pack_image_features makes of an image, newlines included."""
    from transformers.models.llava_next_video.modeling_llava_next_video import get_anyres_image_grid_shape, unpad_image

    side = int(config.vision_config.image_size)
    cells = side // int(config.vision_config.patch_size)
    tall, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    _, rows, columns = unpad_image(torch.empty(1, tall * cells, wide * cells, device="meta"), size).shape
    return int(cells**2 + rows * (columns + 1))


@hookimpl
def specvlm_families() -> dict[str, str]:
    return {"llava_next_video": "specvlm_llava_next_video:LlavaNextVideo"}
