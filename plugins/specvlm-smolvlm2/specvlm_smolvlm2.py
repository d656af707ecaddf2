"""SmolVLM2 for specvlm: each frame is an image after its time, images are split into tiles; 1-D positions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from num2words import num2words
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specvlm.errors import UserError
from specvlm.models.processed import placed, row_of
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe, inputs_of, received
from specvlm.strategies.plugins import hookimpl
from specvlm.types import TokenGrid, VideoPrompt
from specvlm.video.preprocess import normalization_of, normalized, resized
from specvlm.video.settings import read_video_settings
from specvlm.video.video import Clip, VideoInfo

PROCESSORS = ("SmolVLM",)
LANCZOS = 1  # PIL's number; the released checkpoints resize this way
# Hugging Face's processors resize bicubically where torch has no Lanczos filter.
MODE = "lanczos" if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa") else "bicubic"
FPS, FRAMES, SKIPPED_S = 1.0, 64, 1.0  # the first two if a checkpoint sets no numbers; seconds skipped at both ends
LARGEST = 4096  # longest side of a frame that the processor makes
# What the text says in front of a frame, and in front of a video's first one. Tokenizers may change spaces and case.
FRAME = r"frame\s*from\s*\d+\s*:\s*\d+\s*:\s*(<[^<>]*>\s*)*$"
INTRO = r"series\s*of.*\[\s*h\s*:\s*mm\s*:\s*ss\s*\]\s*video"
BATCH = 8  # frames resized at a time


@dataclass(frozen=True)
class SmolVLMVideoConfig:
    """How frames are resized (the longer side first, then to a square) and normalized, as in SmolVLMVideoProcessor."""

    longest: int = 4 * 364
    side: int = 364
    fps: float = FPS
    most: int = FRAMES
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read a model folder. `size` wins over the `video_size` of `video_sampling`, as in SmolVLMVideoProcessor."""
        found = read_video_settings(folder, PROCESSORS, (LANCZOS,))
        sampling = found.get("video_sampling") or {}
        if not isinstance(sampling, dict):
            raise UserError(f"{folder}: video_sampling of the video processor is not an object of settings")
        sizes = {"longest": found.get("size") or sampling.get("video_size"), "side": found.get("max_image_size")}
        given = {name: _edge(folder, size) for name, size in sizes.items() if size is not None}
        fps, most = sampling.get("fps", found.get("fps")), sampling.get("max_frames", found.get("num_frames"))
        if (fps is not None and not _positive(fps)) or (most is not None and not (_positive(most) and type(most) is int)):
            raise UserError(f"{folder}: fps={fps!r} and max_frames={most!r} of the video processor: expected numbers above 0")
        return cls(**given, fps=float(fps or FPS), most=most or FRAMES, **normalization_of(found))


class SmolVLM2(VideoLM):
    """SmolVLM2.

    Videos are {"pixels": (F, 3, side, side), "times": seconds, "duration": seconds}, images {"pixels", "rows"}.
    """

    family = "smolvlm"
    axes = 1

    @staticmethod
    def slots(config: Any) -> tuple[int, int]:
        return int(config.image_token_id), int(config.image_token_id)  # a frame is an image

    @cached_property
    def _video_config(self) -> SmolVLMVideoConfig:
        return SmolVLMVideoConfig.from_folder(self.folder)

    @property
    def _side(self) -> int:
        """Side of the square of tokens of a frame or a tile."""
        config = self.hf.config
        return int(config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor)

    def check_settings(self) -> None:
        ours, side = self._video_config.side, self.hf.config.vision_config.image_size
        if ours != side:
            raise UserError(f"{self.folder}: frames are {ours}x{ours} for the processor, {side}x{side} for the model")

    # ---- prompts

    def template(self, videos: bool) -> str | None:
        """Return the template of Hugging Face's processor for chats with a video: older ones have no video mark."""
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        return DEFAULT_CHAT_TEMPLATE if videos else None

    @property
    def marks(self) -> tuple[str, str]:
        return self._token("video_token", "<video>"), self._token("image_token", "<image>")

    def _token(self, name: str, default: str) -> str:
        return str(getattr(self.tokenizer, name, None) or default)

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        spent = timedelta(seconds=int(video["duration"]))
        intro = f"You are provided the following series of {num2words(grid.frames)} frames from a {spent} [H:MM:SS] video.\n"
        frames = (
            f"\nFrame from {int(s // 60):02d}:{int(s % 60):02d}:{self.spell_image({'rows': (0, 0)})}" for s in video["times"]
        )
        return f"{intro}{''.join(frames)}\n\n"

    def spell_image(self, image: dict[str, Any]) -> str:
        fake, slot = self._token("fake_image_token", "<fake_token_around_image>"), self.marks[1]
        whole = f"{fake}{self._token('global_image_token', '<global-img>')}{slot}{fake}"
        rows, columns = image["rows"]
        lines = ("".join(f"{fake}<row_{r + 1}_col_{c + 1}>{slot}" for c in range(columns)) + "\n" for r in range(rows))
        return f"{''.join(lines)}\n{whole}" if rows and columns else whole

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        return [grid.per_frame] * grid.frames

    def image_runs(self, image: dict[str, Any]) -> list[int]:
        return [self._side**2] * len(image["pixels"])

    # ---- pixels

    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Take one frame a second, at most 64, without the first and last second of a long video."""
        config = self._video_config

        def chosen(total: int, count: int) -> list[int]:
            return frame_numbers(total, info.fps, config.fps, config.most)

        return {"frames": len(chosen(info.frames, 0)), "sampling": chosen}

    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        if max_pixels:
            raise UserError(f"max_pixels={max_pixels}: {self.family} takes frames of one size, there is nothing to limit")
        config = self._video_config
        pixels = torch.empty(len(clip.frames), 3, config.side, config.side)
        for part, place in zip(clip.frames.split(BATCH), pixels.split(BATCH), strict=True):
            first = resized(part, longest_to(part.shape[2], part.shape[3], config.longest), MODE)
            place[:] = normalized(resized(first, (config.side, config.side), MODE), config)
        times = [index / clip.source_fps for index in clip.index] or list(clip.times)
        return TokenGrid(len(pixels), self._side, self._side), {
            "pixels": pixels,
            "times": times,
            "duration": clip.total_frames / clip.source_fps,
        }

    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        processor = SmolVLMImageProcessorPil.from_pretrained(self.folder, local_files_only=True)
        asked = {"input_data_format": "channels_first", "return_tensors": "pt", "return_row_col_info": True}
        made = processor.preprocess(image.numpy(), **asked)
        pixels = made["pixel_values"][0]
        rows = int(made["rows"][0][0]), int(made["cols"][0][0])
        return {"pixels": pixels, "rows": rows, "tokens": len(pixels) * self._side**2}

    # ---- features

    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor:
        last = self.hf.model.vision_model.encoder.layers[-1].self_attn

        def encode(pixels_F: Tensor) -> Tensor:
            with inputs_of(None if sight is None else last) as entering:
                features_ND = self.encode_image({"pixels": pixels_F})
            if sight is not None:
                sight.add(self._seen(entering[0], last))
            return features_ND

        return self.encode_frames(video["pixels"], grid, self.frame_patches(video)[1], frames, encode)

    def _seen(self, hidden_FRD: Tensor, attention: Any) -> Tensor:
        """(F * P, C) attention that each token receives in a layer, then its key: means over heads and patches."""
        query, key = (
            project(hidden_FRD).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        received_FR = received(query, key, float(attention.scale))
        seen_FRC = torch.cat([received_FR[..., None], key.to(received_FR.dtype).mean(1)], -1)
        many = (self._side, int(self.hf.config.scale_factor))
        return seen_FRC.unflatten(1, (*many, *many)).mean((2, 4)).flatten(0, 2)

    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        vision = self.hf.config.vision_config
        return len(video["pixels"]), int(vision.image_size // vision.patch_size) ** 2

    def encode_image(self, image: dict[str, Any]) -> Tensor:
        pixels = image["pixels"].to(self.device, self.dtype)
        return torch.cat(list(self.hf.model.get_image_features(pixels[None]).pooler_output))

    # ---- Hugging Face's own model

    @staticmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        """Return the model's inputs. Shorter videos are padded with black frames; beside images, they are not."""
        inputs = {"input_ids": prompt.tokens[None], "attention_mask": torch.ones_like(prompt.tokens[None])}
        if not prompt.items:
            return inputs
        pixels = [item["pixels"] for item in prompt.items]
        stack = torch.cat(pixels)[None] if prompt.images else pad_sequence(pixels, batch_first=True)
        mask = torch.ones(*stack.shape[:2], *stack.shape[3:], dtype=torch.int64)
        return inputs | {"pixel_values": stack, "pixel_attention_mask": mask}

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        """Invert `hf_inputs`. In the text, a time comes before each frame, and an introduction before each video."""
        tokens_S, given = row_of(inputs, frozenset({"pixel_values", "pixel_attention_mask"})), inputs.get("pixel_values")
        cells, slots_N = self._side**2, (tokens_S == self.image_token).nonzero().flatten()
        tiles = torch.empty(0) if given is None else given.cpu().flatten(0, 1)
        tiles = tiles[tiles.flatten(1).any(1)] if len(tiles) else tiles  # without the padding of shorter videos
        if len(slots_N) != cells * len(tiles):
            seen = f"input_ids have {len(slots_N)} slots, pixel_values fill {cells * len(tiles)}"
            raise UserError(f"{seen}: do they belong together?")
        runs = slots_N.split(cells) if len(tiles) else ()
        kinds = self._kinds(tokens_S, runs)
        starts = [number for number, kind in enumerate(kinds) if kind in ("video", "image")]
        videos, images, slots = [], [], ([tokens_S[:0]], [tokens_S[:0]])
        for first, end in pairwise([*starts, len(kinds)]):
            pixels, video = tiles[first:end], kinds[first] == "video"
            slots[not video].extend(runs[first:end])
            if video:
                videos.append({"pixels": pixels, "times": list(range(len(pixels))), "duration": len(pixels)})
            else:
                images.append({"pixels": pixels, "rows": (0, 0), "tokens": len(pixels) * cells})
        grids = [TokenGrid(len(video["pixels"]), self._side, self._side) for video in videos]
        return placed(tokens_S, (torch.cat(slots[0]), torch.cat(slots[1])), grids, videos, images)

    def _kinds(self, tokens_S: Tensor, runs: Sequence[Tensor]) -> list[str]:
        """Return "video" or "image" for each run that begins one, and "" for a run that continues the one before."""
        found, end, tiled = [], 0, False
        for run_R in runs:
            text = self.tokenizer.decode(tokens_S[end : int(run_R[0])].tolist())
            tile = re.search(r"<row_(\d+)_col_(\d+)>\s*$", text)
            if tile:
                found.append("image" if tile[1] == tile[2] == "1" else "")
            elif re.search(FRAME, text, re.IGNORECASE):
                found.append("video" if re.search(INTRO, text, re.IGNORECASE) else "")
            else:
                found.append("" if tiled else "image")  # the whole image follows its tiles
            tiled, end = bool(tile), int(run_R[-1]) + 1
        return found


def frame_numbers(total: int, fps: float, rate: float, most: int) -> list[int]:
    """Choose frames as SmolVLMVideoProcessor does: `rate` a second, at most `most`."""
    seconds = total / fps
    first, last = 0, total - 1
    if seconds - 2 * SKIPPED_S > most * rate:
        first, last = int(SKIPPED_S * fps), min(int(total - SKIPPED_S * fps), total - 1)
    first, last = (first, last) if first < last else (0, total - 1)
    count = max(1, min(round(rate * seconds), most))
    return np.unique(np.linspace(first, last, count, dtype=int)).tolist()


def longest_to(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return a (height, width) with `longest` as the longer side, the other one even, as in SmolVLMVideoProcessor."""
    longest = min(longest, LARGEST)
    if width >= height:
        other = int(longest / (width / height))
        return max(other + other % 2, 1), longest
    other = int(longest * (width / height))
    return longest, max(other + other % 2, 1)


def _edge(folder: Path, size: Any) -> int:
    """Return the longest edge of a size. Raises UserError if it has another form."""
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if type(edge) is not int or not 1 <= edge <= LARGEST:
        raise UserError(f"{folder}: size={size!r} of the video processor: expected a longest_edge from 1 to {LARGEST}")
    return edge


def _positive(number: Any) -> bool:
    return type(number) in (int, float) and 0 < number < math.inf


@hookimpl
def specvlm_families() -> dict[str, str]:
    return {"smolvlm": "specvlm_smolvlm2:SmolVLM2"}
