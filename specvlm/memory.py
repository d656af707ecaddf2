"""What a run will need, worked out from configurations before any weight is loaded."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from specvlm.cache import pooled
from specvlm.models.quantize import bytes_of
from specvlm.models.video_lm import CHUNK, VideoLM

Kinds = tuple[str | None, str | None]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, of one device. Weights and caches are exact, activations an estimate from the widest layer."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan(
    target: VideoLM, draft: VideoLM | None, slots: int, kept: int, dtype: torch.dtype, patches: int, kinds: Kinds = (None, None)
) -> MemoryPlan:
    """slots: of the target's cache, prompt + new tokens + tree; kept: of the drafter's; patches: of one pass of a tower.

    kinds: what the linear layers of target and draft are quantised to. target and draft may be skeletons (see
    `load.skeleton`), and must not be quantised yet. draft None: no second cache.
    """
    parts = {"target weights": weights(target, dtype, kinds[0]), "target KV cache": kv_bytes(target, pooled(slots), dtype)}
    if draft is not None:
        if draft is not target:
            parts["draft weights"] = weights(draft, dtype, kinds[1])
        parts["draft KV cache"] = kv_bytes(draft, pooled(kept), dtype)
    config, vision = target.hf.config.get_text_config(), target.hf.config.vision_config
    text_rows = min(slots, CHUNK) * (3 * config.intermediate_size + 4 * config.hidden_size)
    vision_rows = patches * (3 * vision.intermediate_size + 8 * vision.hidden_size)  # it rotates in float32
    prompt = 2 * slots * config.hidden_size  # video features and embeddings, there all the while
    # A quantised head is dequantised in full where it runs through Hugging Face's modules, as in the prefill.
    quantised = [model for model, kind in zip((target, draft), kinds, strict=True) if model and kind]
    heads = [model.vocabulary * model.hf.config.get_text_config().hidden_size for model in quantised]
    parts["activations (estimate)"] = (prompt + max(text_rows, vision_rows, *heads)) * dtype.itemsize
    return MemoryPlan(parts)


def weights(model: VideoLM, dtype: torch.dtype, kind: str | None = None) -> int:
    return bytes_of(model.hf, dtype, kind)


def kv_bytes(model: VideoLM, slots: int, dtype: torch.dtype) -> int:
    return 2 * model.layers * model.kv_heads * model.head_dim * slots * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had, None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for its next tensors
        return torch.cuda.mem_get_info(device)[0] + unused
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    line = next((line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def ran_out(error: BaseException) -> bool:
    """Is it memory that an error is about? torch has a type of its own for one allocator of several."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "ALLOC_FAILED", "out of memory")  # the CPU's allocator, cuBLAS and its kin, CUDA itself
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Of the allocator on a GPU; of the whole process, since its start, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
