"""What a run will need, worked out from configurations before any weight is loaded."""

import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from specvlm.app.placement import Placement
from specvlm.models.checkpoint import packed_bytes
from specvlm.models.kv_cache import pooled
from specvlm.models.partition import device_map, split
from specvlm.models.quantize import stored
from specvlm.models.video_lm import CHUNK, VideoLM
from specvlm.parallel.torchrun import rank_here

Stages = Sequence[tuple[int, torch.device]]  # so many layers there, in their order


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, of one device. Weights and caches are exact, activations an estimate from the widest layer."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Need:
    """A model, which may be a skeleton (see `load.skeleton`) and must not be quantised yet, and what a run asks of it.

    slots: of its cache; kind: what its linear layers are quantised to. signals: bytes held for strategies, see `signals`.
    """

    model: VideoLM
    slots: int
    dtype: torch.dtype
    kind: str | None = None
    signals: int = 0


def plan(
    target: Need,
    draft: Need | None,
    patches: int,
    places: Placement,
    free: Mapping[torch.device, int | None],
    layers: Sequence[int] = (),
) -> tuple[dict[torch.device, MemoryPlan], list[int]]:
    """The plan of each device of this process, and the layers of each of the target's, where they are split by what is free.

    draft: None, or the target once more where that drafts: then it has a second cache, and nothing else. patches: of one pass
    of a vision tower. Activations are planned on every device that a prefill passes. layers: as a split target lies already.
    """
    second = draft is not None and draft.model is target.model
    mine = draft if draft and not second and (places.draft_shared or rank_here() == 0) else None
    users = {device: [target] for device in places.target}
    parts: dict[torch.device, dict[str, int]] = {device: {} for device in places.devices}
    if mine:
        users.setdefault(places.draft, []).append(mine)
        ranks = places.ranks if places.draft_shared else 1
        lies = [(mine.model.layers, places.draft)]
        parts[places.draft] |= {"draft weights": weights(mine, lies, ranks)[places.draft]}
        parts[places.draft] |= {"draft KV cache": cache(mine, mine.model.layers, ranks)}
    for device, needs in users.items():
        parts[device]["activations (estimate)"] = activations(needs, patches)
    counts: list[int] = []
    stages = [(target.model.layers, places.first)]
    if places.parallel == "layers":
        bare = weights(target, [(0, device) for device in places.target])
        room = [max(1.0, (free[d] or 0) - bare[d] - sum(parts[d].values())) for d in places.target]
        counts = list(layers) or split(target.model.layers, room)
        stages = list(zip(counts, places.target, strict=True))
    held = weights(target, stages, places.ranks)
    for number, device in stages:
        ours = {"target weights": held[device], "target KV cache": cache(target, number, places.ranks)}
        if second and draft:
            ours["draft KV cache"] = cache(draft, number, places.ranks)
        parts[device] = ours | parts[device]
    if places.ranks > 1 and (beside := while_loading(target, mine if places.draft_shared else None, places)):
        over = beside - sum(parts[places.first].values())
        parts[places.first] |= {"more while shares load": over} if over > 0 else {}
    return {device: MemoryPlan(found) for device, found in parts.items()}, counts


def weights(need: Need, stages: Stages, ranks: int = 1) -> dict[torch.device, int]:
    """By device, of a rank. A tied head on another device than the embedding is there twice; layers of no stage nowhere. Those
    of a quantised checkpoint lie on one device.
    """
    if need.model.quantised and (packed := packed_bytes(need.model.folder, need.model.hf.config)):
        return {stages[0][1]: packed}
    parts = device_map(need.model.hf, [count for count, _ in stages], [device for _, device in stages])
    found, seen = {device: 0 for _, device in stages}, set()
    for weight in stored(need.model.hf, need.dtype, need.kind, ranks):
        device = next((there for part, there in parts.items() if f"{weight.name}.".startswith(f"{part}.")), None)
        if device is not None and (weight.key, device) not in seen:
            seen.add((weight.key, device))
            found[device] += weight.nbytes
    return found


def cache(need: Need, layers: int, ranks: int = 1) -> int:
    """Of so many of the model's layers, on a rank, which has its share of the heads."""
    return kv_bytes(need.model, pooled(need.slots), need.dtype) // need.model.layers * layers // ranks


def activations(needs: Sequence[Need], patches: int) -> int:
    """Of the models that take turns on a device, so the largest of them counts."""
    prompts, passes = [], []
    for need in needs:
        config, vision = need.model.hf.config.get_text_config(), need.model.hf.config.vision_config
        text_rows = min(need.slots, CHUNK) * (3 * config.intermediate_size + 4 * config.hidden_size)
        vision_rows = patches * (3 * vision.intermediate_size + 8 * vision.hidden_size)  # it rotates in float32
        # A quantised head is dequantised in full where it runs through Hugging Face's modules, as in the prefill.
        head = need.model.vocabulary * config.hidden_size if need.kind else 0
        # Features, embeddings and signals, there all the while.
        prompts.append(2 * need.slots * config.hidden_size * need.dtype.itemsize + need.signals)
        passes.append(max(text_rows, vision_rows, head) * need.dtype.itemsize)
    return max(prompts) + max(passes)


def while_loading(target: Need, draft: Need | None, places: Placement) -> int:
    """Most that shares of weights take at once on their way in: Hugging Face puts a whole share there, then it is quantised.

    draft: one that is shared too; it comes when the target is quantised. 0 where nothing is quantised.
    """

    def share(need: Need) -> int:
        return weights(need, [(need.model.layers, places.first)], places.ranks)[places.first]

    most = share(replace(target, kind=None)) if target.kind else 0
    return max(most, share(target) + share(replace(draft, kind=None))) if draft and draft.kind else most


def kv_bytes(model: VideoLM, slots: int, dtype: torch.dtype) -> int:
    return 2 * model.layers * model.kv_heads * model.head_dim * slots * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for its next tensors
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def ran_out(error: BaseException) -> bool:
    """Is it memory that an error is about? torch has a type of its own for one allocator of several."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "ALLOC_FAILED", "out of memory")  # the CPU's allocator, cuBLAS and its kin, CUDA itself
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def reset_peak(device: torch.device) -> None:
    """From here on. On a CPU where the system has a way to, else the peak stays that since the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Since the last reset: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
