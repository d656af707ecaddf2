"""Preprocess frames for a model, bit-equal on the CPU to Hugging Face's video processors.

Those need torchvision; this module needs only torch, and processes the frames in chunks. Equality (``torch.equal``) is
tested against transformers 5.17 and 5.23. It holds because uint8 is resized on the CPU: the results of resizing floats
differ by up to 17/255.

Shapes: T frames, H height, W width, C = 3 colours, S side; grid (t, h, w) counts patches.
Source of both recipes: transformers ``video_processing_qwen2_vl.py``, ``video_processing_llava_onevision.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from specvlm.errors import UserError, explained
from specvlm.video.settings import read_video_settings

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CHUNK = 8  # frames resized at a time; for Qwen, rounded down to whole temporal patches


@dataclass(frozen=True)
class QwenVideoConfig:
    """How frames are resized, normalized and cut into patches for Qwen2.5-VL; defaults as in Qwen2VLVideoProcessor.

    Released checkpoints set the bounds of images (``max_pixels`` 12,845,056), which Hugging Face applies to each frame
    of a video, too. Lower them with ``dataclasses.replace(config, max_pixels=…)``, or set ``cap_pixels_per_frame``.

    Attributes:
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Frames per patch.
        merge_size: Side of the square of patches that becomes one token.
        min_pixels: Minimum number of pixels of a resized frame.
        max_pixels: Maximum number of pixels of a resized frame.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
        rescale: Factor from 8-bit values to the scale 0 to 1.
        cap_pixels_per_frame: True to also limit each frame to its part of ``max_video_tokens``, as qwen-vl-utils does.
        max_video_tokens: Token budget of a video if ``cap_pixels_per_frame`` is set. Frames get equal parts of 90 % of
            it, but at least 1.05 * ``min_pixels``, so that very many frames exceed it.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128_000
    processors: ClassVar[tuple[str, ...]] = ("Qwen2VL", "Qwen2_5_VL")  # beginnings of their class names

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read a model folder as AutoVideoProcessor does.

        Raises UserError if settings are missing, invalid or not supported.
        """
        found = read_video_settings(Path(folder), cls.processors)
        size = found.get("size") or {"shortest_edge": cls.min_pixels, "longest_edge": cls.max_pixels}
        size = dict(size) if isinstance(size, dict) else {}
        for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if found.get(bound) is not None:
                size[edge] = found[bound]
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            raise UserError(f"{folder}: size={size} of the video processor lacks shortest_edge and longest_edge (pixels)")
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(f"{folder}: size={size} of the video processor: the shortest_edge is the larger one")
        plain = ("patch_size", "temporal_patch_size", "merge_size", "max_video_tokens")
        return cls(
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            cap_pixels_per_frame=bool(found.get("cap_pixels_per_frame")),
            **{name: found[name] for name in plain if found.get(name) is not None},
            **normalization_of(found),
        )

    def seconds_per_grid(self, fps: float) -> float:
        """Return ``second_per_grid_ts``, the seconds per step of the temporal grid, for frames sampled at ``fps``."""
        return self.temporal_patch_size / fps

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which each of ``frames`` frames of this size is resized.

        Raises UserError if one side is more than 200 times the other.
        """
        factor = self.patch_size * self.merge_size
        most = self.max_pixels
        if self.cap_pixels_per_frame:
            budget = int(self.max_video_tokens * factor * factor * 0.9)
            most = max(min(most, budget * self.temporal_patch_size // frames), int(self.min_pixels * 1.05))
        return _smart_resize(height, width, factor, self.min_pixels, most)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the patch grid (t, h, w) of a clip, which gives t*h*w / merge_size² tokens.

        Raises UserError if one side is more than 200 times the other.
        """
        tall, wide = self.frame_size(frames, height, width)
        return -(-frames // self.temporal_patch_size), tall // self.patch_size, wide // self.patch_size


@dataclass(frozen=True)
class Qwen3VideoConfig(QwenVideoConfig):
    """`QwenVideoConfig` for Qwen3-VL, with pixel bounds of a whole video; defaults as in Qwen3VLVideoProcessor.

    If ``cap_pixels_per_frame`` is set, ``max_video_tokens`` limits each frame.
    """

    patch_size: int = 16
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    max_video_tokens: int = 768
    processors: ClassVar[tuple[str, ...]] = ("Qwen3VL",)

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        factor, group, most = self.patch_size * self.merge_size, self.temporal_patch_size, self.max_pixels
        if frames < group:
            raise UserError(f"the model takes at least {group} frames, and the clip has {frames}")
        if self.cap_pixels_per_frame:
            most = frames * max(min(self.max_video_tokens * factor**2, most // frames), int(self.min_pixels * 1.05))
        with explained(f"frames of {width}x{height}"):
            return smart_resize(frames, height, width, group, factor, self.min_pixels, most)


@dataclass(frozen=True)
class LlavaVideoConfig:
    """How frames are resized and normalized for LLaVA-OneVision; defaults as in LlavaOnevisionVideoProcessor.

    Attributes:
        height: Height of a resized frame in pixels. The aspect ratio is not kept.
        width: Width of a resized frame in pixels.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
        rescale: Factor from 8-bit values to the scale 0 to 1.
    """

    height: int = 384
    width: int = 384
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    processors: ClassVar[tuple[str, ...]] = ("LlavaOnevision",)  # beginnings of their class names

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read a model folder as AutoVideoProcessor does.

        Raises UserError if settings are missing, invalid or not supported.
        """
        found = read_video_settings(Path(folder), cls.processors)
        if found.get("do_center_crop"):
            raise UserError(f"{folder}: do_center_crop of the video processor is not supported")
        size = found.get("size") or {"height": cls.height, "width": cls.width}
        if not isinstance(size, dict) or not size.get("height") or not size.get("width"):
            raise UserError(f"{folder}: size={size} of the video processor: only height and width are supported")
        return cls(height=size["height"], width=size["width"], **normalization_of(found))


def qwen_video(frames: Tensor, config: QwenVideoConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Preprocess frames for Qwen2.5-VL. The last frame is repeated to fill the last temporal patch.

    Args:
        frames: (T, 3, H, W) uint8, on the CPU.
        config: Sizes and normalization.

    Returns:
        Patches (t*h*w, C*temporal*patch*patch) float32, and their grid (t, h, w).

    Raises:
        UserError: The clip is empty, or one side is more than 200 times the other.
        ValueError: `frames` is not uint8 (T, 3, H, W) on the CPU.
    """
    _check_frames(frames)
    count, _, height, width = frames.shape
    size = config.frame_size(count, height, width)
    grid_t, grid_h, grid_w = config.grid(count, height, width)
    group, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    cells = grid_h * grid_w
    patches = torch.empty(grid_t * cells, 3 * group * patch * patch)
    done = 0
    for chunk in _chunks(frames, max(_CHUNK // group, 1) * group):
        pixels = normalized(resized(chunk, size), config)
        if rest := -len(pixels) % group:
            pixels = torch.cat([pixels, pixels[-1:].expand(rest, -1, -1, -1)])
        blocks = pixels.view(-1, group, 3, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
        rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, patches.shape[1])
        patches[done : done + len(rows)] = rows
        done += len(rows)
    return patches, (grid_t, grid_h, grid_w)


def llava_video(frames: Tensor, config: LlavaVideoConfig) -> Tensor:
    """Preprocess frames for LLaVA-OneVision.

    Args:
        frames: (T, 3, H, W) uint8, on the CPU.
        config: Size and normalization.

    Returns:
        (T, 3, height, width) float32.

    Raises:
        UserError: The clip is empty.
        ValueError: `frames` is not uint8 (T, 3, H, W) on the CPU.
    """
    _check_frames(frames)
    size = (config.height, config.width)
    pixels = torch.empty(len(frames), 3, *size)
    for place, chunk in enumerate(_chunks(frames, _CHUNK)):
        pixels[place * _CHUNK : place * _CHUNK + len(chunk)] = normalized(resized(chunk, size), config)
    return pixels


def _check_frames(frames: Tensor) -> None:
    """Raise ValueError unless frames are uint8 (T, 3, H, W) on the CPU, and UserError if there are none."""
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[1] != 3 or frames.device.type != "cpu":
        raise ValueError(
            f"frames: expected uint8 (T, 3, H, W) on the CPU, got {frames.dtype} {tuple(frames.shape)} on {frames.device}"
        )
    if 0 in frames.shape:
        raise UserError(f"the clip is empty: {frames.shape[0]} frames of {frames.shape[3]}x{frames.shape[2]}")


def _chunks(frames: Tensor, size: int) -> Iterator[Tensor]:
    return (frames[first : first + size] for first in range(0, len(frames), size))


def resized(frames: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize uint8 frames (T, 3, H, W) to (height, width) as torchvision's v2 resize does, with antialiasing."""
    if tuple(frames.shape[2:]) == size:
        return frames
    return interpolate(frames, size, mode=mode, align_corners=False, antialias=True)


class Normalization(Protocol):
    """Mean and std of each channel on the scale 0 to 1, and the factor from 8-bit values to that scale."""

    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def rescale(self) -> float: ...


def normalized(frames: Tensor, config: Normalization) -> Tensor:
    """Rescale and normalize 8-bit values in one step, as Hugging Face does. Returns float32."""
    mean = torch.tensor(config.mean) * (1.0 / config.rescale)
    std = torch.tensor(config.std) * (1.0 / config.rescale)
    return (frames.float() - mean[:, None, None]) / std[:, None, None]


def _smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return a (height, width) of about the same aspect ratio, in multiples of ``factor``, with an area within bounds.

    Raises UserError if one side is more than 200 times the other.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) / min(height, width) > 200:
        raise UserError(f"frames of {width}x{height}: no side may be more than 200 times the other")
    return smart_resize(height, width, factor, min_pixels, max_pixels)


def normalization_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the normalization settings that the checkpoint sets, under the names of our fields."""
    names = {"image_mean": "mean", "image_std": "std", "rescale_factor": "rescale"}
    values = {ours: found[theirs] for theirs, ours in names.items() if found.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
