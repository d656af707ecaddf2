"""What a run will need, worked out from configurations before any weight is loaded."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specvlm.cache import pooled
from specvlm.models.quantize import bytes_of
from specvlm.models.spread import split, tensor_plan
from specvlm.models.video_lm import CHUNK, VideoLM
from specvlm.places import Places
from specvlm.torchrun import rank_here

Kinds = tuple[str | None, str | None]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, of one device. Weights and caches are exact, activations an estimate from the widest layer."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan(
    target: VideoLM,
    draft: VideoLM | None,
    slots: int,
    kept: int,
    dtype: torch.dtype,
    patches: int,
    kinds: Kinds = (None, None),
    states: bool = False,
) -> MemoryPlan:
    """slots: of the target's cache, prompt + new tokens + tree; kept: of the drafter's; patches: of one pass of a tower.

    kinds: what the linear layers of target and draft are quantised to. states: the pruner reads hidden states of the target, so
    that one layer's are held. target and draft may be skeletons (see
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
    prompt = (2 + states) * slots * config.hidden_size  # video features and embeddings, there all the while, and states
    # A quantised head is dequantised in full where it runs through Hugging Face's modules, as in the prefill.
    quantised = [model for model, kind in zip((target, draft), kinds, strict=True) if model and kind]
    heads = [model.vocabulary * model.hf.config.get_text_config().hidden_size for model in quantised]
    parts["activations (estimate)"] = (prompt + max(text_rows, vision_rows, *heads)) * dtype.itemsize
    return MemoryPlan(parts)


def layer_bytes(target: VideoLM, slots: int, dtype: torch.dtype) -> int:
    """Weights and keys of one of the target's layers."""
    held = sum(weight.numel() for weight in target.text.layers.parameters()) * dtype.itemsize
    return (held + kv_bytes(target, pooled(slots), dtype)) // target.layers


def by_device(
    whole: MemoryPlan,
    target: VideoLM,
    drafts: VideoLM | None,
    slots: int,
    dtype: torch.dtype,
    places: Places,
    free: Sequence[float],
    kinds: Kinds = (None, None),
) -> tuple[dict[torch.device, MemoryPlan], list[int]]:
    """The plan of each device of this process, and the layers of each device where they are split. free: of target's devices.

    whole: what one device would need for everything. Activations are needed on every device a prefill passes. What quantised
    shares save is left out.
    """
    draft = {name: count for name, count in whole.parts.items() if name.startswith("draft")}
    mine = {name: count for name, count in whole.parts.items() if name not in draft}
    if places.parallel and "draft weights" not in draft:  # the target drafts for itself, and its second cache lies as its first
        mine["target KV cache"] += sum(draft.values())
        draft = {}
    parts: dict[torch.device, dict[str, int]] = {device: {} for device in places.devices}
    counts: list[int] = []
    if places.parallel == "tensor":
        share = 0 if kinds[0] else shared_bytes(target, dtype, places.ranks) * (places.ranks - 1) // places.ranks
        kv = mine["target KV cache"] // places.ranks
        parts[places.first] = mine | {"target weights": mine["target weights"] - share, "target KV cache": kv}
        if places.draft_shared and drafts is not None:
            saved = 0 if kinds[1] else shared_bytes(drafts, dtype, places.ranks) * (places.ranks - 1) // places.ranks
            kv = draft["draft KV cache"] // places.ranks
            draft = {"draft weights": draft["draft weights"] - saved, "draft KV cache": kv}
    elif places.parallel == "layers":
        per_layer, activations = layer_bytes(target, slots, dtype), mine["activations (estimate)"]
        kv = mine["target KV cache"] // target.layers
        tail = sum(w.numel() for module in (target.text.norm, target.hf.lm_head) for w in module.parameters()) * dtype.itemsize
        ends = {device: 0 for device in places.target} | {places.target[-1]: tail}
        ends[places.first] += max(0, mine["target weights"] - tail - target.layers * (per_layer - kv))
        beside = {d: ends[d] + activations + (sum(draft.values()) if d == places.draft else 0) for d in places.target}
        room = [max(1.0, have - beside[device]) for have, device in zip(free, places.target, strict=True)]
        counts = split(target.layers, room)
        for device, layers in zip(places.target, counts, strict=True):
            weights_here = layers * (per_layer - kv) + ends[device]
            parts[device] = mine | {"target weights": weights_here, "target KV cache": layers * kv}
    else:
        parts[places.first] = mine
    if places.draft_shared or rank_here() == 0:
        parts[places.draft] |= draft
    ordered = {device: {name: held[name] for name in whole.parts if name in held} for device, held in parts.items()}
    return {device: MemoryPlan(held) for device, held in ordered.items()}, counts


def shared_bytes(target: VideoLM, dtype: torch.dtype, ranks: int) -> int:
    """Of the target's weights, what tensor parallelism shares: linear layers of the text part, and the head where it can."""
    shared = sum(w.numel() for name, w in target.text.layers.named_parameters() if "norm" not in name)
    if tensor_plan(target.hf.config, ranks).get("lm_head") == "colwise_gather_output":
        shared += target.hf.lm_head.weight.numel()
    return shared * dtype.itemsize


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
