"""GLM-4.1V, GLM-4.5V and GLM-4.6V for specvlm: image tokens of each frame before its time, M-RoPE by frame.

The checkpoint's settings decide how frames are sampled and times are written: as in Glm4vProcessor (4.1V, 4.5V), or as
in Glm46VProcessor (4.6V and 4.6V-Flash, whose models have the older classes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from specvlm.errors import UserError, explained
from specvlm.models.processed import placed, row_of
from specvlm.models.qwen2_5_vl import Qwen2_5_VL, parts_of
from specvlm.models.vision_probe import VisionProbe
from specvlm.strategies.plugins import hookimpl
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.preprocess import QwenVideoConfig, qwen_video
from specvlm.video.settings import read_video_settings
from specvlm.video.video import Clip, VideoInfo

FPS, LONGEST_S = 2.0, 300.0  # Glm4vVideoProcessor's, if the checkpoint sets no numbers
RATES = ((30, 3.0), (300, 1.0), (2400, 0.5))  # Glm46VVideoProcessor's: up to so many seconds, temporal patches a second
MOST_FRAMES = 640  # the same's


@dataclass(frozen=True)
class Glm4vVideoConfig(QwenVideoConfig):
    """How frames are resized and normalized: like Qwen2-VL's, with pixel bounds of a whole video.

    The defaults are those of Glm4vVideoProcessor.
    """

    processors: ClassVar[tuple[str, ...]] = ("Glm4v", "Glm46V")
    min_pixels: int = 112 * 112
    max_pixels: int = 28 * 28 * 2 * 30000

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        from transformers.models.glm4v.video_processing_glm4v import smart_resize

        factor, group = self.patch_size * self.merge_size, self.temporal_patch_size
        with explained(f"frames of {width}x{height}"):
            return smart_resize(frames, height, width, group, factor, self.min_pixels, self.max_pixels)


class Glm4v(Qwen2_5_VL):
    """GLM-4.1V and GLM-4.6V-Flash.

    Videos are {"pixels": (t*h*w, patch values), "thw": patch grid, "times": seconds of each frame}.
    """

    family = lineage = "glm4v"

    @staticmethod
    def slots(config: Any) -> tuple[int, int]:
        return int(config.image_token_id), int(config.image_token_id)  # a frame is an image

    @cached_property
    def _video_config(self) -> Glm4vVideoConfig:
        return Glm4vVideoConfig.from_folder(self.folder)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return read_video_settings(self.folder, Glm4vVideoConfig.processors)

    @property
    def _newer(self) -> bool:
        """Whether the checkpoint has the processors of GLM-4.6V."""
        kinds = ("video_processor_type", "processor_class", "image_processor_type")
        return next((str(self._settings[kind]) for kind in kinds if self._settings.get(kind)), "").startswith("Glm46V")

    @property
    def vision_values(self) -> int:
        vision = self.hf.config.vision_config
        merger = vision.intermediate_size // self._merge**2
        return int(3 * max(vision.out_hidden_size, merger) + 8 * vision.hidden_size)

    # ---- prompts

    @property
    def marks(self) -> tuple[str, str]:
        named = (getattr(self.tokenizer, f"{kind}_token", None) or f"<|{kind}|>" for kind in ("video", "image"))
        video, image = map(str, named)
        return video, image

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        times = (f"{time:.1f} seconds" if self._newer else str(int(time)) for time in video["times"])
        return "".join(f"<|begin_of_image|>{self.marks[1]}<|end_of_image|>{time}" for time in times)

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        return [grid.per_frame] * grid.frames

    def _kinds(self, prompt: VideoPrompt) -> Tensor:
        kinds_1S = torch.zeros(1, len(prompt), dtype=torch.int32)
        kinds_1S[0, prompt.image_index], kinds_1S[0, prompt.video_index] = 1, 2
        return kinds_1S

    def positions(self, prompt: VideoPrompt) -> Tensor:
        grids = {name: grid for name, grid in self._grids(prompt).items() if name != "second_per_grid_ts"}
        found, _ = self.hf.model.get_rope_index(prompt.tokens[None], mm_token_type_ids=self._kinds(prompt), **grids)
        return found[:, 0]

    def _grids(self, prompt: VideoPrompt) -> dict[str, Tensor | None]:
        return super()._grids(replace(prompt, videos=tuple(video | {"seconds": 0.0} for video in prompt.videos)))

    # ---- pixels

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Sample frames as the checkpoint's processor does. `process_video` repeats an odd last one, as it does."""
        found = self._settings

        def chosen(total: int, count: int) -> list[int]:
            if found.get("do_sample_frames") is False:
                return list(range(total))
            if self._newer:
                return by_patches(total, info.fps, self._video_config.temporal_patch_size)
            return by_seconds(total, info.fps, float(found.get("fps") or FPS), float(found.get("max_duration") or LONGEST_S))

        return {"frames": len(chosen(info.frames, 0)), "sampling": chosen}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        config, frames = self._video_config, clip.frames
        group = config.temporal_patch_size
        if rest := -len(frames) % group:
            frames = torch.cat([frames, frames[-1:].expand(rest, -1, -1, -1)])
        if max_pixels:
            config = replace(config, max_pixels=max_pixels * len(frames))
        if config.max_pixels < config.min_pixels:
            raise UserError(f"max_pixels={max_pixels}: the checkpoint's videos have at least {config.min_pixels} pixels")
        pixels, (t, h, w) = qwen_video(frames, config)
        times = ([place / clip.source_fps for place in clip.index] or list(clip.times))[::group]
        return TokenGrid(t, h // self._merge, w // self._merge), {"pixels": pixels, "thw": (t, h, w), "times": times}

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        processor = Glm4vImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        with explained(f"an image of {image.shape[2]}x{image.shape[1]}"):
            made = processor.preprocess(image.numpy(), input_data_format="channels_first", return_tensors="pt")
        t, h, w = made["image_grid_thw"][0].tolist()
        return {"pixels": made["pixel_values"], "thw": (t, h, w), "tokens": t * h * w // self._merge**2}

    # ---- features

    def _tower(self, pixels: Tensor, thw: tuple[int, int, int], sight: VisionProbe | None = None) -> Tensor:
        """(t*h*w / merge², D) features. The tower takes every frame as a separate image."""
        visual, (t, h, w) = self.hf.model.visual, thw
        extra = {} if sight is None else {"sight": sight.of(visual.blocks[-1].attn)}
        grid = torch.tensor([[1, h, w]] * t, device=self.device)
        out: Tensor = visual(pixels.to(self.device, visual.dtype), grid_thw=grid, **extra).pooler_output
        if sight is not None:  # patches of one token are adjacent
            sight.add(sight.take().unflatten(0, (-1, self._merge**2)).mean(1))
        return out

    # ---- Hugging Face's own model

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        """Return the model's inputs. It refuses videos beside images, so their frames are then passed as images."""
        kinds_S = torch.zeros(len(prompt), dtype=torch.int32)
        kinds_S[prompt.image_index], kinds_S[prompt.video_index] = 1, 1 if prompt.images else 2
        made = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        made["mm_token_type_ids"] = kinds_S[None]
        if prompt.items:
            pixels, grids = [item["pixels"] for item in prompt.items], [item["thw"] for item in prompt.items]
            if prompt.images:
                grids = [(1, h, w) for t, h, w in grids for _ in range(t)]
            names = ("pixel_values", "image_grid_thw") if prompt.images else ("pixel_values_videos", "video_grid_thw")
            made |= dict(zip(names, (torch.cat(pixels), torch.tensor(grids)), strict=True))
        return made

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        """Invert `hf_inputs`. Image tokens between the start and end of a video are its frames.

        Times are only in the text, so frames are counted instead.
        """
        names = frozenset({"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"})
        tokens_S, tags = row_of(inputs, names), ["<|begin_of_video|>", "<|end_of_video|>"]
        starts_S, ends_S = ((tokens_S == tag).cumsum(0) for tag in self.tokenizer.convert_tokens_to_ids(tags))
        slot_S, inside_S = tokens_S == self.image_token, starts_S > ends_S
        videos = parts_of(inputs.get("pixel_values_videos"), inputs.get("video_grid_thw"))
        images, slots = [], slot_S.nonzero().flatten() if not videos else (slot_S & ~inside_S).nonzero().flatten()
        frames, at = dict[int, list[dict[str, Any]]](), 0
        for item in parts_of(inputs.get("pixel_values"), inputs.get("image_grid_thw")):
            first = int(slots[min(at, len(slots) - 1)]) if len(slots) else 0
            tokens = math.prod(item["thw"]) // self._merge**2
            if inside_S[first]:
                frames.setdefault(int(starts_S[first]), []).append(item)
            else:
                images.append(item | {"tokens": tokens})
            at += tokens
        videos += [_joined(some) for some in frames.values()]
        grids = [TokenGrid(t, h // self._merge, w // self._merge) for t, h, w in (video["thw"] for video in videos)]
        videos = [video | {"times": list(range(video["thw"][0]))} for video in videos]
        index = (slot_S & inside_S).nonzero().flatten(), (slot_S & ~inside_S).nonzero().flatten()
        return placed(tokens_S, index, grids, videos, images)


class Glm4vMoe(Glm4v):
    """GLM-4.5V and GLM-4.6V, with a mixture of experts. A dense model, such as GLM-4.6V-Flash, may draft for it."""

    family = "glm4v_moe"


class Glm46V(Glm4v):
    """Models of transformers' class for GLM-4.6V, whose language model may be dense or a mixture of experts."""

    family = "glm46v"


def _joined(frames: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join frames to a video."""
    _, h, w = frames[0]["thw"]
    return {"pixels": torch.cat([frame["pixels"] for frame in frames]), "thw": (len(frames), h, w)}


def by_seconds(total: int, fps: float, rate: float, longest: float) -> list[int]:
    """Choose frames as Glm4vVideoProcessor does: `rate` per second.

    In a video longer than `longest` seconds, as many as for that length, spread over the whole video.
    """
    last, seconds = total - 1, total / fps
    if seconds <= longest:
        found = [min(last, math.ceil(number * fps / rate)) for number in range(max(math.floor(seconds * rate), 1))]
    elif (count := int(longest * rate)) >= total:
        found = list(range(total))
    else:
        found = [min(last, math.ceil(time * fps)) for time in np.linspace(0, seconds, count)]
    return list(dict.fromkeys(found))


def by_patches(total: int, fps: float, group: int) -> list[int]:
    """Choose frames as Glm46VVideoProcessor does: in patches of `group` frames, at a higher rate for shorter videos."""
    seconds = total / fps
    spent = min(seconds, RATES[-1][0])
    rate = next(rate for end, rate in RATES if spent <= end)
    count = min(int(spent * rate * group), MOST_FRAMES)
    found, due = list[int](), 0.0
    for number in range(total if total >= count else 0):
        if number * (1 / fps) >= due:
            due += 1 / (group * rate)
            found.append(number)
            if due >= int(seconds):
                break
    if len(found) != count:
        first, last = (found[0], found[-1]) if 0 < len(found) < count else (0, total - 1)
        found = np.linspace(first, last, count, dtype=int).tolist()
    return list(dict.fromkeys(found)) or [0]


@hookimpl
def specvlm_families() -> dict[str, str]:
    here = "specvlm_glm4v"
    return {"glm4v": f"{here}:Glm4v", "glm4v_moe": f"{here}:Glm4vMoe", "glm46v": f"{here}:Glm46V"}
