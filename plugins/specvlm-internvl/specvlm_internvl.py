"""InternVL3 and InternVL3.5 for specvlm: each frame is an image after its number; 1-D positions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.processed import placed, row_of
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe, inputs_of, received
from specvlm.strategies.plugins import hookimpl
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.preprocess import LlavaVideoConfig, llava_video
from specvlm.video.settings import SamplingSettings
from specvlm.video.video import Clip, VideoInfo

FRAMES = 16  # frames per video, if the checkpoint sets no number


@dataclass(frozen=True)
class InternVLVideoConfig(LlavaVideoConfig):
    """Frames are resized and normalized like LLaVA-OneVision's."""

    processors: ClassVar[tuple[str, ...]] = ("InternVL", "GotOcr2")


class InternVL(VideoLM):
    """InternVL. Videos are {"pixels": (F, 3, height, width)}, images {"pixels": (tiles, 3, height, width)}."""

    family = "internvl"
    axes = 1

    @staticmethod
    def slots(config: Any) -> tuple[int, int]:
        return int(config.image_token_id), int(config.image_token_id)  # a frame is an image

    @cached_property
    def _video_config(self) -> InternVLVideoConfig:
        return InternVLVideoConfig.from_folder(self.folder)

    def check_settings(self) -> None:
        ours, sides = self._video_config, tuple(self.hf.config.vision_config.image_size)
        if (ours.height, ours.width) != sides:
            raise UserError(f"{self.folder}: frames are {ours.height}x{ours.width} for the processor, {sides} for the model")

    # ---- prompts

    @property
    def marks(self) -> tuple[str, str]:
        return self.tokenizer.video_token, self.tokenizer.context_image_token

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        return "\n".join(f"Frame{number + 1}: {self.spell_image({})}" for number in range(grid.frames))

    def spell_image(self, image: dict[str, Any]) -> str:
        tokenizer = self.tokenizer
        return f"{tokenizer.start_image_token}{tokenizer.context_image_token}{tokenizer.end_image_token}"

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        return [grid.per_frame] * grid.frames

    # ---- pixels

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Take 16 frames, each from the middle of its share of the video."""
        settings = SamplingSettings.from_folder(self.folder, InternVLVideoConfig.processors)
        return {"frames": min(settings.num_frames or FRAMES, info.frames), "sampling": middles}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        if max_pixels:
            raise UserError(f"max_pixels={max_pixels}: {self.family} takes frames of one size, there is nothing to limit")
        pixels = llava_video(clip.frames, self._video_config)
        return self._grid(len(pixels)), {"pixels": pixels}

    def _grid(self, frames: int) -> TokenGrid:
        vision = self.hf.config.vision_config
        patches = [size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        height, width = (int(count * self.hf.config.downsample_ratio) for count in patches)
        return TokenGrid(frames, height, width)

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        processor = GotOcr2ImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        asked = {"input_data_format": "channels_first", "crop_to_patches": True, "return_tensors": "pt"}
        tiles = processor.preprocess(image.numpy(), **asked)["pixel_values"]
        return {"pixels": tiles, "tokens": len(tiles) * self.hf.config.image_seq_length}

    # ---- features

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        last = self.hf.model.vision_tower.encoder.layer[-1].attention

        def encode(pixels_F: Tensor) -> Tensor:
            with inputs_of(None if sight is None else last) as entering:
                features_ND = self.encode_image({"pixels": pixels_F})
            if sight is not None:
                sight.add(self._seen(entering[0], last, grid))
            return features_ND

        return self.encode_frames(video["pixels"], grid, self.frame_patches(video)[1], frames, encode)

    def _seen(self, hidden_FRD: Tensor, attention: Any, grid: TokenGrid) -> Tensor:
        """(F * P, C) attention that each token receives in a layer, then its key: means over heads and patches."""
        query, key = (
            norm(project(hidden_FRD)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm))
        )
        received_FR = received(query, key, float(attention.scale))
        seen_FRC = torch.cat([received_FR[..., None], key.to(received_FR.dtype).mean(1)], -1)[:, 1:]  # the class token is first
        side = round((seen_FRC.shape[1] / grid.per_frame) ** 0.5)
        return seen_FRC.unflatten(1, (grid.height, side, grid.width, side)).mean((2, 4)).flatten(0, 2)

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        vision = self.hf.config.vision_config
        height, width = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
        return len(video["pixels"]), height * width

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        return self.hf.model.get_image_features(image["pixels"].to(self.device, self.dtype)).pooler_output.flatten(0, 1)

    # ---- Hugging Face's own model

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        inputs = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        pixels = [item["pixels"] for item in prompt.items]
        return inputs | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        """Invert `hf_inputs`. In the text, a frame is one tile after its number, and frame 1 begins a video."""
        tokens_S, given = row_of(inputs, frozenset({"pixel_values"})), inputs.get("pixel_values")
        runs = _runs((tokens_S == self.image_token).nonzero().flatten())
        counts = [len(run_R) // self.hf.config.image_seq_length for run_R in runs]
        tiles = torch.empty(0) if given is None else given.cpu()
        if sum(counts) != len(tiles):
            raise UserError(f"input_ids have {sum(counts)} tiles, pixel_values {len(tiles)}: do they belong together?")
        videos, images, slots, last = [], [], ([tokens_S[:0]], [tokens_S[:0]]), 0
        for number, run_R, part in zip(self._numbers(tokens_S, runs, counts), runs, tiles.split(counts), strict=True):
            last = number if number in (1, last + 1) else 0
            slots[last == 0].append(run_R)
            if last > 1:
                videos[-1]["pixels"] = torch.cat([videos[-1]["pixels"], part])
            else:
                (videos if last else images).append({"pixels": part} | ({} if last else {"tokens": len(run_R)}))
        index = torch.cat(slots[0]), torch.cat(slots[1])
        return placed(tokens_S, index, [self._grid(len(video["pixels"])) for video in videos], videos, images)

    def _numbers(self, tokens_S: Tensor, runs: list[Tensor], counts: list[int]) -> list[int]:
        """Return the frame number in the text before each run; 0 for a run that is not a frame."""
        announced, end, found = rf"frame\s*(\d+)\s*:\s*{re.escape(self.tokenizer.start_image_token)}\s*$", 0, []
        for run_R, count in zip(runs, counts, strict=True):
            text = self.tokenizer.decode(tokens_S[end : int(run_R[0])].tolist())
            match, end = re.search(announced, text, re.IGNORECASE), int(run_R[-1]) + 1
            found.append(int(match[1]) if match and count == 1 else 0)
        return found


def _runs(index_N: Tensor) -> list[Tensor]:
    """Split ascending indices into runs of adjacent ones."""
    ends = ((index_N[1:] - index_N[:-1]) != 1).nonzero().flatten() + 1
    return [run_R for run_R in index_N.tensor_split(ends.tolist()) if len(run_R)]


def middles(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames as InternVLVideoProcessor does: each from the middle of its share."""
    return torch.arange(total / count / 2, total, total / count).int().tolist()[:count]


@hookimpl
def specvlm_families() -> dict[str, str]:
    return {"internvl": "specvlm_internvl:InternVL"}
