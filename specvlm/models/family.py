"""Interface of a model family: how its checkpoints see videos and images, and how their prompts are written.

Shape suffixes: S prompt tokens, A rotary axes, D hidden size, L DeepStack levels, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.vision_probe import VisionProbe
from specvlm.types import Features, TokenGrid, VideoPrompt
from specvlm.video.video import Clip, VideoInfo


class Family(ABC):
    """Base of every model family. Derive from `VideoLM`, which implements passes and caches, and define these methods.

    Attributes:
        family: Hugging Face's `model_type`.
        axes: Number of rotary axes: 1, or 3 for M-RoPE.
        lineage: Models with the same lineage can form a pair. Empty: the family's own name.
        version: Version of the family's code. A stored baseline (the target's own answer) is reused only if its key has
            the same version. The key has the package's version and a hash of the family's files in any case.
        hf: The Hugging Face model; its language model is that of `hf.get_decoder()`, its head `hf.lm_head`.
        folder: The checkpoint's folder.
    """

    family: ClassVar[str]
    axes: ClassVar[int]
    lineage: ClassVar[str] = ""
    version: ClassVar[str] = ""
    hf: Any
    tokenizer: Any
    folder: Path

    @staticmethod
    def slots(config: Any) -> tuple[int, int]:
        """Return the ids of the slot tokens, the placeholders of videos and of images in a prompt. They may be equal.

        Raises UserError if config.json has no `video_token_id` or `image_token_id`: then a family must define this
        method.
        """
        video, image = (getattr(config, name, None) for name in ("video_token_id", "image_token_id"))
        if video is None or image is None:
            raise UserError("config.json has no video_token_id or no image_token_id: its family must define `slots`")
        return int(video), int(image)

    @property
    def levels(self) -> int:
        """Number of leading layers after which DeepStack features are added to the hidden states."""
        return 0

    @property
    def vision_values(self) -> int:
        """Number of values per patch that the vision tower holds at once, for the memory plan."""
        vision = self.hf.config.vision_config
        return int(3 * vision.intermediate_size + 8 * vision.hidden_size)  # includes the rotary embedding in float32

    @abstractmethod
    def check_settings(self) -> None:
        """Raise UserError if the video processor's settings do not fit the model."""

    # ---- prompts

    @property
    def marks(self) -> tuple[str, str]:
        """Return the texts that the chat template writes in place of a video and of an image."""
        video, image = self.tokenizer.convert_ids_to_tokens(list(self.slots(self.hf.config)))
        return video, image

    def spell_video(self, grid: TokenGrid, video: dict[str, Any]) -> str:
        """Return the text that replaces a video's mark, with one slot token for each run of features (`runs`)."""
        return self.marks[0]

    def spell_image(self, image: dict[str, Any]) -> str:
        """Return the text that replaces an image's mark, with one slot token per run of features (`image_runs`)."""
        return self.marks[1]

    def runs(self, grid: TokenGrid, video: dict[str, Any]) -> list[int]:
        """Return the lengths of a video's runs of adjacent slots, which sum to `len(grid)`: one run, or one per frame.

        video: What `process_video` returned with the grid.
        """
        return [len(grid)]

    def image_runs(self, image: dict[str, Any]) -> list[int]:
        """Return the lengths of an image's runs of adjacent slots, which sum to `image["tokens"]`, like `runs`."""
        return [int(image["tokens"])]

    def template(self, videos: bool) -> str | None:
        """Return the chat template to use for a chat with or without videos. None: the checkpoint's own."""
        return None

    def positions(self, prompt: VideoPrompt) -> Tensor:
        """Return the rotary positions of the whole prompt, (A, S).

        Generated text continues, on every axis, after the last slot's largest position.
        """
        return torch.arange(len(prompt)).expand(self.axes, -1)

    # ---- pixels

    @abstractmethod
    def sampling(self, info: VideoInfo) -> dict[str, Any]:
        """Return how the family samples frames of this video, as keyword arguments of `read_video`."""

    @abstractmethod
    def process_video(self, clip: Clip, max_pixels: int | None = None) -> tuple[TokenGrid, dict[str, Any]]:
        """Preprocess a clip for the vision tower, exactly as the Hugging Face video processor does.

        Returns its token grid and a dict of tensors for `encode_video`. max_pixels: most pixels of a frame.
        """

    @abstractmethod
    def process_image(self, image: Tensor, alone: bool = True) -> dict[str, Any]:
        """Preprocess an image, uint8 (3, H, W), into a dict for `encode_image`, with its token count under "tokens".

        alone: Whether it is the prompt's only image; some families cut an image into tiles only then.
        """

    # ---- features

    @abstractmethod
    def encode_video(
        self, grid: TokenGrid, video: dict[str, Any], frames: Tensor | None, sight: VisionProbe | None = None
    ) -> Tensor | Features:
        """Run the vision tower on one video. Returns (len(grid), D) features, as a `Features` if `levels` is not 0.

        frames: Frames to encode; the rows of all others are zero. None encodes all.
        sight: Records the attention that each token receives. It needs all frames to be encoded.
        """

    @abstractmethod
    def frame_patches(self, video: dict[str, Any]) -> tuple[int, int]:
        """Return how many frames go through the vision tower, and the number of patches per frame, for the memory plan.

        The number of frames is usually that of the grid (in Qwen2.5-VL, each stands for two frames of the clip). It
        differs if frames have different numbers of tokens: then the grid is a single row, `TokenGrid(1, 1, N)`.
        """

    @abstractmethod
    def encode_image(self, image: dict[str, Any]) -> Tensor | Features:
        """Run the vision tower on one image from `process_image`; returns one (D,) row per token."""

    # ---- Hugging Face's own model

    @staticmethod
    @abstractmethod
    def hf_inputs(config: Any, prompt: VideoPrompt) -> dict[str, Tensor]:
        """Convert a prompt to the inputs that Hugging Face's processor would give the model, on the host.

        Must not share code with `positions` and `encode_video`, since `check=hf` uses it to find bugs in them.
        """

    def hf_prompt(self, inputs: Mapping[str, Any]) -> VideoPrompt:
        """Convert the inputs that Hugging Face's processor gives the model to a prompt. The inverse of `hf_inputs`.

        Raises UserError if they do not hold exactly one prompt, or the family does not define this method.
        """
        raise UserError(f"{self.family} does not take a processor's inputs: give a text or messages, with the videos")

    @classmethod
    def tiny(cls, text: dict[str, Any], ids: dict[str, int]) -> Any:
        """Build a tiny random Hugging Face model for tests of strategies, from torch's global generator.

        text: Settings of its language model. ids: Settings with the ids of its special tokens.
        """
        raise NotImplementedError(f"{cls.family} has no tiny model")

    @classmethod
    def tiny_video(cls, frames: int, generator: torch.Generator) -> tuple[TokenGrid, dict[str, Any]]:
        """Make a random video for the tiny model: its grid, and what `process_video` would return."""
        raise NotImplementedError(f"{cls.family} has no tiny model")
