"""Shapes of families that packages under plugins/ bring. Install the package, or let `family_of` find it there.

Sizes are those of the released config.json files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.gpu_pair.text import Text
from specvlm.models import families
from specvlm.models.video_lm import VideoLM
from specvlm.types import TokenGrid

PLUGINS = Path(__file__).parents[2] / "plugins"
PLACES = {"smolvlm": "SmolVLM2", "llava_next_video": "LlavaNextVideo", "glm4v": "Glm4v"}


def family_of(model_type: str) -> type[VideoLM]:
    """Import the class of a family from the folder of its package, which need not be installed."""
    folder = PLUGINS / families.PACKAGES[model_type]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    module = __import__(folder.name.replace("-", "_"))
    found: type[VideoLM] = getattr(module, PLACES[model_type])
    return found


def noise(generator: torch.Generator | None, *size: int) -> torch.Tensor | None:
    """Make random pixels; none without a generator."""
    return None if generator is None else torch.randn(*size, generator=generator)


@dataclass(frozen=True)
class SmolVLM:
    """Shape of a SmolVLM2 of 256M or 500M: SigLIP base at 512 pixels, 64 tokens a frame, Llama. small: for tests."""

    text: Text
    small: bool = False
    family = "smolvlm"

    def config(self) -> Any:
        from transformers import SmolVLMConfig

        vision: dict[str, Any] = dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
        )
        theta, image = 1e5, 49190
        if self.small:
            vision |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            vision |= dict(image_size=32, patch_size=4)
            theta, image = 1e3, 1
        rope = {"rope_type": "default", "rope_theta": theta}
        return SmolVLMConfig(
            text_config=_plain(self.text, rope_parameters=rope, model_type="llama"),
            vision_config=vision,
            image_token_id=image,
            scale_factor=4,
            tie_word_embeddings=self.text.tied,
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Make a video of about `tokens` tokens."""
        side, pixel = (2, 32) if self.small else (8, 512)
        frames = max(1, round(tokens / side**2))
        times = [float(frame) for frame in range(frames)]
        pixels = noise(generator, frames, 3, pixel, pixel)
        return TokenGrid(frames, side, side), {"pixels": pixels, "times": times, "duration": float(frames)}


@dataclass(frozen=True)
class LlavaNextVideo:
    """Shape of a LLaVA-NeXT-Video: CLIP large at 336 pixels, 144 tokens a frame, Llama. small: for tests."""

    text: Text
    small: bool = False
    family = "llava_next_video"

    def config(self) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig

        vision: dict[str, Any] = dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        ids, layer = (32001, 32000), -2
        if self.small:
            vision |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            vision |= dict(image_size=24, patch_size=4)
            ids, layer = (1, 2), -1
        rope = {"rope_type": "default", "rope_theta": 1e4}
        return LlavaNextVideoConfig(
            text_config=LlamaConfig(**_plain(self.text, rope_parameters=rope)),
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=ids[0],
            video_token_index=ids[1],
            vision_feature_layer=layer,
            tie_word_embeddings=self.text.tied,
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Make a video of about `tokens` tokens."""
        side, pixel = (3, 24) if self.small else (12, 336)
        frames = max(1, round(tokens / side**2))
        return TokenGrid(frames, side, side), {"pixels": noise(generator, frames, 3, pixel, pixel)}


@dataclass(frozen=True)
class Glm4v:
    """Shape of a GLM-4.1V: four norms a layer, rotary positions in half of each head. small: for tests."""

    text: Text
    small: bool = False
    family = "glm4v"

    def config(self) -> Any:
        from transformers import Glm4vConfig

        vision: dict[str, Any] = dict(depth=24, hidden_size=1536, intermediate_size=13696, num_heads=12, image_size=336)
        sections, first = [8, 12, 12], 151339
        if self.small:
            vision |= dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, image_size=16, patch_size=4)
            sections, first = [1, 1, 0], 1
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": sections}
        names = ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id")
        ids = dict(zip((*names, "image_token_id", "video_token_id"), range(first, first + 6), strict=True))
        return Glm4vConfig(
            text_config=_plain(self.text, rope_parameters=rope),
            vision_config=vision | {"out_hidden_size": self.text.width},
            tie_word_embeddings=self.text.tied,
            **ids,
        )

    def video(self, tokens: int, generator: torch.Generator | None) -> tuple[TokenGrid, dict[str, Any]]:
        """Make a video of about `tokens` tokens: temporal patches of 16 x 16 tokens (448 x 448 pixels)."""
        side, patch = (2, 4) if self.small else (16, 14)
        frames = max(1, round(tokens / side**2))
        pixels = noise(generator, frames * 4 * side**2, 3 * 2 * patch**2)
        times = [float(frame) for frame in range(frames)]
        return TokenGrid(frames, side, side), {"pixels": pixels, "thw": (frames, 2 * side, 2 * side), "times": times}


def _plain(text: Text, **more: Any) -> dict[str, Any]:
    """Make the arguments of a text config without those of Qwen's."""
    return {key: value for key, value in text.config(**more).items() if key not in ("use_sliding_window", "max_window_layers")}
