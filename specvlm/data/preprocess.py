"""Frames to pixel tensors."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class QwenVideoConfig:
    @classmethod
    def from_folder(cls, folder: str | Path) -> "QwenVideoConfig":
        raise NotImplementedError


@dataclass(frozen=True)
class LlavaVideoConfig:
    @classmethod
    def from_folder(cls, folder: str | Path) -> "LlavaVideoConfig":
        raise NotImplementedError


def qwen_video(frames: Tensor, config: QwenVideoConfig) -> tuple[Tensor, tuple[int, int, int]]:
    raise NotImplementedError


def llava_video(frames: Tensor, config: LlavaVideoConfig) -> Tensor:
    raise NotImplementedError


def qwen_image(image: Tensor, folder: str | Path) -> tuple[Tensor, tuple[int, int, int]]:
    raise NotImplementedError


def llava_image(image: Tensor, folder: str | Path) -> tuple[Tensor, tuple[int, int], int]:
    raise NotImplementedError
