"""VideoLLaMA 3 for specvlm: frames of any size after their times, near-equal patches left out; 1-D positions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.processed import assembled, row_of
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.strategies.plugins import hookimpl
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.preprocess import QwenVideoConfig, qwen_video
from specvlm.video.settings import SamplingSettings, read_video_settings
from specvlm.video.video import Clip, VideoInfo

MIN_FRAMES, MAX_FRAMES = 4, 180  # VideoLlama3VideoProcessor's, if the checkpoint sets no numbers
THRESHOLD = 0.1  # of 255: a patch that differs less from the one before it in time is left out


@dataclass(frozen=True)
class VideoLlama3VideoConfig(QwenVideoConfig):
    """Frames are resized and normalized like Qwen2-VL's; `max_pixels` is the sum over a video's frames."""

    processors: ClassVar[tuple[str, ...]] = ("VideoLlama3",)
    temporal_patch_size: int = 1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class VideoLlama3(VideoLM):
    """VideoLLaMA 3.

    Videos are {"pixels": (F, patches, 588), "thw", "merge", "kept": (F * P,), "times": seconds of frames}.

    If the processor leaves patches out, frames have unequal numbers of tokens, which no grid describes. The grid of
    such a video is one row, (1, 1, tokens); all its frames are encoded, whatever a draft keeps. Other videos have the
    usual grid (frames, height, width).
    """

    family = "video_llama_3"
    axes = 1

    @cached_property
    def _video_config(self) -> VideoLlama3VideoConfig:
        return VideoLlama3VideoConfig.from_folder(self.folder)

    @cached_property
    def _compresses(self) -> bool:
        settings = read_video_settings(self.folder, VideoLlama3VideoConfig.processors)
        return bool(settings.get("use_token_compression", True))

    def check_settings(self) -> None:
        ours, patch = self._video_config, self.hf.config.vision_config.patch_size
        if (ours.patch_size, ours.temporal_patch_size) != (patch, 1):
            raise UserError(
                f"{self.folder}: patches are {ours.temporal_patch_size}x{ours.patch_size}x{ours.patch_size} for the "
                f"processor, 1x{patch}x{patch} for the model"
            )

    # ---- prompts

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        return ",".join(f"Time {time:.1f}s:{self.marks[0]}" for time in video["times"])

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        return video["kept"].unflatten(0, (len(video["times"]), -1)).sum(1).tolist()

    # ---- pixels

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Take `fps` frames per second or `num_frames`, as the checkpoint says; all frames if it says neither."""
        settings, count = SamplingSettings.from_folder(self.folder, VideoLlama3VideoConfig.processors), info.frames
        if settings.num_frames is not None:
            count = min(settings.num_frames, info.frames)
        elif settings.fps is not None:
            least, most = settings.min_frames or MIN_FRAMES, settings.max_frames or MAX_FRAMES
            count = math.floor(min(max(info.frames / info.fps * settings.fps, least), most, info.frames))
        return {"frames": count, "sampling": starts}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        config, count = self._video_config, len(clip.frames)
        share = config.max_pixels // count
        config = replace(config, max_pixels=min(share, max_pixels) if max_pixels else share)
        patches, (frames, height, width) = qwen_video(clip.frames, config)
        grid = TokenGrid(frames, height // config.merge_size, width // config.merge_size)
        pixels = patches.unflatten(0, (frames, -1))
        kept = changed(pixels, config.merge_size) if self._compresses else torch.ones(len(grid), dtype=torch.bool)
        times = [index / clip.source_fps for index in clip.index] or clip.times  # as VideoMetadata.timestamps
        video = {
            "pixels": pixels,
            "thw": torch.tensor([[frames, height, width]]),
            "merge": torch.tensor([config.merge_size]),
            "kept": kept,
            "times": list(times),
        }
        return grid if kept.all() else TokenGrid(1, 1, int(kept.sum())), video

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

        processor = VideoLlama3ImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        made = processor.preprocess(image.numpy(), input_data_format="channels_first", return_tensors="pt")
        thw, merge = made["image_grid_thw"], made["image_merge_sizes"]
        tokens = int(thw.prod()) // int(merge) ** 2
        return {"pixels": made["pixel_values"], "thw": thw, "merge": merge, "tokens": tokens}

    # ---- features

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        thw, merge, kept, seen = video["thw"], video["merge"], video["kept"], []
        count, height, width = thw[0].tolist()
        whole = TokenGrid(count, height // int(merge), width // int(merge))
        last = self.hf.model.vision_model.encoder.layers[-1].self_attn

        def encode(pixels_FPC: Tensor) -> Tensor:
            here = torch.tensor([[len(pixels_FPC), height, width]])
            watch = {} if sight is None else {"sight": sight.of(last)}
            features_ND = self._features(pixels_FPC.flatten(0, 1), here, merge, **watch)
            if sight is not None:
                seen.append(sight.take().unflatten(0, (-1, int(merge) ** 2)).mean(1))  # a token's patches are neighbours
            return features_ND

        left_out = not kept.all()  # then the grid is one frame, and all of its features are needed
        features_ND = self.encode_frames(video["pixels"], whole, height * width, None if left_out else frames, encode)
        if sight is not None:
            seen_NC = torch.cat(seen)
            sight.add(seen_NC[kept.to(seen_NC.device)] if left_out else seen_NC)
        return features_ND[kept.to(features_ND.device)] if left_out else features_ND

    def _features(self, pixels_NC: Tensor, thw: Tensor, merge: Tensor, **watch: Any) -> Tensor:
        pixels_NC, thw, merge = pixels_NC.to(self.device, self.dtype), thw.to(self.device), merge.to(self.device)
        return torch.cat(self.hf.model.get_image_features(pixels_NC, thw, merge, **watch).pooler_output)

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        frames, patches, _ = video["pixels"].shape
        return frames, patches

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        return self._features(image["pixels"], image["thw"], image["merge"])

    # ---- Hugging Face's own model

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        inputs = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        for items, pixels, kind in ((prompt.images, "pixel_values", "image"), (prompt.videos, "pixel_values_videos", "video")):
            if items:
                inputs[pixels] = torch.cat([item["pixels"].reshape(-1, item["pixels"].shape[-1]) for item in items])
                inputs[f"{kind}_grid_thw"] = torch.cat([item["thw"] for item in items])
                inputs[f"{kind}_merge_sizes"] = torch.cat([item["merge"] for item in items])
        if prompt.videos:
            inputs["video_compression_mask"] = torch.cat([video["kept"] for video in prompt.videos])
        return inputs

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        """Invert `hf_inputs`. Times of frames are only in the text, so frames are counted instead."""
        made = {f"{kind}_{name}" for kind in ("image", "video") for name in ("grid_thw", "merge_sizes")}
        tokens_S = row_of(inputs, frozenset({"pixel_values", "pixel_values_videos", "video_compression_mask", *made}))
        videos, grids = self._parts(inputs, "pixel_values_videos", "video"), []
        images = self._parts(inputs, "pixel_values", "image")
        sizes = [int(part["thw"].prod()) // int(part["merge"]) ** 2 for part in (*videos, *images)]
        mask, ours = inputs.get("video_compression_mask"), sizes[: len(videos)]
        kept = torch.ones(sum(ours), dtype=torch.bool) if mask is None else mask.flatten().cpu()
        for video, kept_N in zip(videos, kept.split(ours), strict=True):
            frames, height, width = (int(size) for size in video["thw"][0])
            merge = int(video["merge"])
            video |= {"pixels": video["pixels"].unflatten(0, (frames, -1)), "kept": kept_N, "times": list(range(frames))}
            whole = TokenGrid(frames, height // merge, width // merge)
            grids.append(whole if kept_N.all() else TokenGrid(1, 1, int(kept_N.sum())))
        images = [image | {"tokens": tokens} for image, tokens in zip(images, sizes[len(videos) :], strict=True)]
        return assembled(tokens_S, (self.video_token, self.image_token), grids, videos, images)

    def _parts(self, inputs: Mapping[str, Any], pixels: str, kind: str) -> list[dict[str, Any]]:
        """Split the patches of all videos, or of all images, by their grids."""
        given, grids, merges = (inputs.get(name) for name in (pixels, f"{kind}_grid_thw", f"{kind}_merge_sizes"))
        if given is None or grids is None or merges is None:
            return []
        parts = given.cpu().split(grids.prod(1).tolist())
        both = zip(parts, grids.cpu().split(1), merges.cpu().split(1), strict=True)
        return [{"pixels": part, "thw": thw, "merge": merge} for part, thw, merge in both]


def starts(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames as VideoLlama3VideoProcessor does: each the first of its share."""
    return torch.arange(0, total, total / count).int().tolist()[:count]


def changed(pixels_FPC: Tensor, merge: int) -> Tensor:
    """(tokens,) True for tokens that differ from those one frame earlier. A frame keeps at least its first token."""
    pixels_FNC = pixels_FPC.unflatten(1, (-1, merge**2)).flatten(2)
    kept_FN = torch.ones(pixels_FNC.shape[:2], dtype=torch.bool)
    kept_FN[1:] = (pixels_FNC[1:] - pixels_FNC[:-1]).abs().mean(-1) * 255 > THRESHOLD
    kept_FN[:, 0] |= ~kept_FN.any(1)
    return kept_FN.flatten()


@hookimpl
def specvlm_families() -> dict[str, str]:
    return {"video_llama_3": "specvlm_video_llama_3:VideoLlama3"}
