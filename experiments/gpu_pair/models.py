"""Benchmark versions of the families, for which prefilling a video without pixels is free.

A benchmark decodes one prompt dozens of times. Without pixels, features and embeddings are empty tensors on the meta
device. `prefilling` then reuses the rows of the cache's last real prefill, or fills the cache with random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from experiments.gpu_pair.packages import family_of
from specvlm.models.kv_cache import KVCache
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.load import load
from specvlm.models.pauses import Pauses
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.qwen3_vl import Qwen3VL, Qwen3VLMoe
from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.types import Features, KeepSet, VideoPrompt


class Benched(VideoLM):
    """VideoLM that remembers each cache's last prefill: its number of rows and last hidden state."""

    def __init__(self, *more: Any, **named: Any) -> None:
        super().__init__(*more, **named)
        self.filled: WeakKeyDictionary[KVCache, tuple[int, Tensor]] = WeakKeyDictionary()

    def features(self, prompt: VideoPrompt, *more: Any, **named: Any) -> Tensor | Features:
        if prompt.videos[0]["pixels"] is not None:
            return super().features(prompt, *more, **named)
        return torch.empty(len(prompt.video_index), self.text.config.hidden_size, dtype=self.dtype, device="meta")

    def encoding(self, prompt: VideoPrompt, number: int, sight: VisionProbe | None = None) -> Pauses[Tensor | Features]:
        if prompt.videos[number]["pixels"] is not None:
            return (yield from super().encoding(prompt, number, sight))
        return self.features(prompt)

    def embed(self, prompt: VideoPrompt, features_ND: Tensor | Features, keep: KeepSet | None = None) -> Tensor | Features:
        if not isinstance(features_ND, Tensor) or not features_ND.is_meta:
            return super().embed(prompt, features_ND, keep)
        slots = len(prompt) if keep is None else len(prompt.kept_slots(keep.index))
        return features_ND.new_empty(slots, features_ND.shape[1])

    def prefilling(
        self, embeds_SD: Tensor | Features, positions_AS: Tensor, cache: KVCache, *more: Any, **named: Any
    ) -> Pauses[Tensor]:
        rows = len(embeds_SD)
        if not isinstance(embeds_SD, Tensor) or not embeds_SD.is_meta:
            hidden_D = yield from super().prefilling(embeds_SD, positions_AS, cache, *more, **named)
            self.filled[cache] = rows, hidden_D.clone()
        else:
            if self.filled.get(cache, (0,))[0] != rows:
                for layer in (layer for store in cache.stores for tensor in store for layer in tensor):
                    layer[:, :, :rows].normal_()
                self.filled[cache] = rows, torch.randn(embeds_SD.shape[1], dtype=self.dtype, device=self.head_device)
            cache.offset = int(positions_AS[:, -1].max()) + 1 - rows
            cache.advance(rows)
        return self.filled[cache][1]


class BenchedQwen(Benched, Qwen2_5_VL):
    """Qwen2.5-VL."""


class BenchedQwen3(Benched, Qwen3VL):
    """Qwen3-VL."""


class BenchedQwen3Moe(Benched, Qwen3VLMoe):
    """Qwen3-VL with experts."""


class BenchedLlava(Benched, LlavaOneVision):
    """LLaVA-OneVision."""


BUILT_IN: dict[str, type[Benched]] = {cls.family: cls for cls in (BenchedQwen, BenchedQwen3, BenchedQwen3Moe, BenchedLlava)}


def wrap_of(family: str) -> type[Benched]:
    """Return the benchmark version of a family, built in or of a package under plugins/."""
    if family in BUILT_IN:
        return BUILT_IN[family]
    own = family_of(family)
    return type(f"Benched{own.__name__}", (Benched, own), {})


def read(folder: str | Path, device: torch.device, dtype: str, weights: str) -> VideoLM:
    """Load a checkpoint instead of random weights."""
    lm = load(folder, dtype, str(device), weights=None if weights == "bf16" else weights)
    lm.hf.generation_config.eos_token_id = None  # a benchmark goes on past the end of an answer
    return wrap_of(lm.family)(lm.hf, lm.tokenizer, lm.folder, lm.mrope)
