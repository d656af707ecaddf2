"""Plan the memory of a run from model configurations, before any weight is loaded."""

import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from specvlm.models.checkpoint import packed_bytes
from specvlm.models.kv_cache import pooled
from specvlm.models.partition import device_map, split
from specvlm.models.placement import Placement
from specvlm.models.quantize import stored
from specvlm.models.text_passes import CHUNK
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.torchrun import rank_here

JOINED = "joined passes (estimate)"  # name of a part of a plan
Stages = Sequence[tuple[int, torch.device]]  # (layer count, device) per pipeline stage, in order


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by purpose. Activations are estimated; weights and caches are computed exactly.

    The weights of a checkpoint whose files are quantised are an exception: they are estimated by the size of the files.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Need:
    """A model and the settings that determine how much memory it takes.

    Attributes:
        model: The model; may be a skeleton, which has no weights. Must not be quantised by `load` yet.
        slots: Tokens that its KV cache must hold.
        dtype: Dtype of its weights and cache.
        quantisation: How `load` will quantise its text layers and head, such as int8. None: not at all.
        signals: Bytes of attention and hidden states that the prefill keeps for strategies (`collect.held_bytes`).
        joined: Bytes that captured passes of several requests hold. Ignored for a target that is split over devices.
    """

    model: VideoLM
    slots: int
    dtype: torch.dtype
    quantisation: str | None = None
    signals: int = 0
    joined: int = 0


def plan(
    target: Need,
    draft: Need | None,
    patches: int,
    places: Placement,
    free: Mapping[torch.device, int | None],
    layers: Sequence[int] = (),
) -> tuple[dict[torch.device, MemoryPlan], list[int]]:
    """Plan the memory of each device of this process.

    Activations are planned on every device that the prefill runs on.

    Args:
        target: The target.
        draft: The draft. If the target drafts for itself, a second need of the same model, for its second cache. None:
            no model drafts.
        patches: Patches in one pass of the vision tower.
        places: Devices of target and draft.
        free: Free bytes by device, by which the layers of a split target are divided. None counts as 0.
        layers: Number of layers per device, if a split target is already loaded. Empty: split it by free memory.

    Returns:
        The plan by device, and the number of layers per device (empty unless the target is split).

    Raises:
        UserError: The target has fewer layers than devices.
    """
    target_drafts = draft is not None and draft.model is target.model
    mine = draft if draft and not target_drafts and (places.draft_shared or rank_here() == 0) else None
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
        if joined := sum(need.joined for need in needs if need is not target or places.parallel is None):
            parts[device][JOINED] = joined
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
        if target_drafts and draft:
            ours["draft KV cache"] = cache(draft, number, places.ranks)
        parts[device] = ours | parts[device]
    if places.ranks > 1 and (beside := while_loading(target, mine if places.draft_shared else None, places)):
        over = beside - sum(parts[places.first].values())
        parts[places.first] |= {"extra while loading": over} if over > 0 else {}
    return {device: MemoryPlan(found) for device, found in parts.items()}, counts


def weights(need: Need, stages: Stages, ranks: int = 1) -> dict[torch.device, int]:
    """Compute the bytes of weights on each device, for one rank.

    A tied head counts twice if it is on a different device from the embedding. If the stages have fewer layers than the
    model, its last layers are not counted. A checkpoint that stays quantised in memory counts as the size of its files,
    on the first stage's device.
    """
    if need.model.quantised and (packed := packed_bytes(need.model.folder, need.model.hf.config)):
        return {stages[0][1]: packed}
    parts = device_map(need.model.hf, [count for count, _ in stages], [device for _, device in stages])
    found, seen = {device: 0 for _, device in stages}, set()
    for weight in stored(need.model.hf, need.dtype, need.quantisation, ranks):
        device = next((there for part, there in parts.items() if f"{weight.name}.".startswith(f"{part}.")), None)
        if device is not None and (weight.key, device) not in seen:
            seen.add((weight.key, device))
            found[device] += weight.nbytes
    return found


def cache(need: Need, layers: int, ranks: int = 1) -> int:
    """Compute the bytes of the KV cache of `layers` layers, for one rank, which holds its share of the heads."""
    return kv_bytes(need.model, pooled(need.slots), need.dtype) // need.model.layers * layers // ranks


def activations(needs: Sequence[Need], patches: int) -> int:
    """Estimate the peak bytes of activations on a device, from the widest layer of each model.

    Models run in turn, so the largest peak counts. patches: patches in one pass of the vision tower.
    """
    prompts, passes = [], []
    for need in needs:
        config = need.model.hf.config.get_text_config()
        # With experts, a row is held four times per chosen expert: sorted, as output, weighted, in the original order.
        experts = 4 * config.hidden_size * getattr(config, "num_experts_per_tok", 0)
        text_rows = min(need.slots, CHUNK) * (max(3 * config.intermediate_size, experts) + 4 * config.hidden_size)
        vision_rows = patches * need.model.vision_values
        # The prefill runs Hugging Face's modules, which dequantise a quantised head in full.
        head = need.model.vocabulary * config.hidden_size if need.quantisation else 0
        # Features, embeddings and signals live through the whole prefill.
        width = config.hidden_size * (1 + need.model.levels)
        prompts.append(2 * need.slots * width * need.dtype.itemsize + need.signals)
        passes.append(max(text_rows, vision_rows, head) * need.dtype.itemsize)
    return max(prompts) + max(passes)


def while_loading(target: Need, draft: Need | None, places: Placement) -> int:
    """Compute the peak bytes of weights while a tensor-parallel rank loads. Returns 0 if nothing is quantised.

    The rank's share of a model is read in full precision, then quantised. draft: A draft that the ranks share; it is
    loaded after the target is quantised.
    """

    def share(need: Need) -> int:
        return weights(need, [(need.model.layers, places.first)], places.ranks)[places.first]

    most = share(replace(target, quantisation=None)) if target.quantisation else 0
    return max(most, share(target) + share(replace(draft, quantisation=None))) if draft and draft.quantisation else most


def kv_bytes(model: VideoLM, slots: int, dtype: torch.dtype) -> int:
    """Compute the bytes of a KV cache with `slots` slots, over all layers and heads."""
    return 2 * model.layers * model.kv_heads * model.head_dim * slots * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Free memory on a device, in bytes. On a GPU this includes unused memory that torch's allocator holds."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def ran_out(error: BaseException) -> bool:
    """Whether an error means out of memory. Of torch's allocators, only the GPU's raises OutOfMemoryError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # Error texts of, in order: the CPU allocator, cuBLAS and similar libraries, CUDA.
    said = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory of a device. The peak on a CPU can only be reset on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak bytes since the last reset: of torch's allocator on a GPU, of the whole process on a CPU.

    On other systems than Linux, the peak on a CPU is that since the process started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
