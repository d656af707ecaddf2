"""Check that models and requests fit into memory before any is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.room import needs_for
from specvlm.errors import UserError
from specvlm.models.kv_cache import pooled
from specvlm.models.memory_plan import Need, activations, free_bytes, kv_bytes, weights
from specvlm.models.video_lm import VideoLM
from specvlm.types import GenerationOptions, VideoPrompt

GIB = 2**30
FOR_CACHES = 0.8  # share of the free memory that the caches of running requests may take; activations need the rest


def room_for(models: Sequence[VideoLM], prefixes: PrefixStore | None = None) -> int:
    """Return how many bytes the caches of concurrent requests may take together. Requests beyond that wait.

    Args:
        models: Loaded models. The caches may take the share FOR_CACHES of what is still free on their devices.
        prefixes: Store of kept prompts, whose budget on the devices is set aside.
    """
    free = sum(map(free_bytes, {stage.device for model in models for stage in model.stages}))
    return int(FOR_CACHES * (free - (0 if prefixes is None else prefixes.shelf.device_bytes)))


def check_models(models: Sequence[tuple[Need, torch.device]]) -> None:
    """Check that models to be loaded fit into memory, each with a KV cache of `Need.slots` tokens. Raises UserError.

    models: The need of each model, which may be a skeleton, and its device.
    """
    wanted: dict[torch.device, int] = {}
    for need, device in models:
        size = weights(need, [(need.model.layers, device)])[device] + kv_bytes(need.model, pooled(need.slots), need.dtype)
        wanted[device] = wanted.get(device, 0) + size
    _check(wanted, {}, "the models need", "take a smaller dtype, weights='int8', or another device")


def check_request(graph: DecodingGraph, prompt: VideoPrompt, options: GenerationOptions) -> None:
    """Check that the memory that a request needs is free, before any of it is allocated.

    It needs memory for its KV caches, its activations and, if the engine captures passes that several requests share,
    the buffers of those passes. Unused caches in the pool count as free memory. If memory is still short, the prompts
    kept in `graph.prefixes` are dropped, all at once.

    Raises:
        UserError: A device has too little memory.
    """
    models = {"target": graph.target} | ({"draft": graph.draft} if graph.draft is not None else {})
    dtypes = {side: model.dtype for side, model in models.items()}
    needs = needs_for(graph, prompt, options, dtypes, {}, joined=graph.engine.captures)
    patches = max(map(graph.target.vision_rows, prompt.videos), default=0)
    wanted = dict.fromkeys({stage.device for need in needs for stage in need.model.stages}, activations(needs, patches))
    for need in needs:
        for device, size in _cache(need.model, need.slots).items():
            wanted[device] += size
        if len(need.model.stages) == 1:
            wanted[need.model.device] += need.joined
    free = {device: graph.caches.bytes_on(device, leased=False) for device in wanted}
    words = ("the request needs", "ask for fewer frames, fewer new tokens, or less at a time")
    try:
        _check(wanted, free, *words)
    except UserError:
        if graph.prefixes is None or not graph.prefixes.shelf.nbytes():
            raise
        graph.prefixes.empty()
        _check(wanted, free, *words)


def check_answers(target: VideoLM, slots: int, count: int) -> None:
    """Check that the target's caches of `count` answers of `slots` tokens fit, before any is made. Raises UserError."""
    wanted = {device: count * size for device, size in _cache(target, slots).items()}
    _check(
        wanted, {}, f"{count} answers need" if count > 1 else "the answer needs", "ask for fewer answers, or fewer new tokens"
    )


def _cache(model: VideoLM, slots: int) -> dict[torch.device, int]:
    """Bytes of a cache on each device."""
    layer, found = kv_bytes(model, pooled(slots), model.dtype) // model.layers, dict[torch.device, int]()
    for stage in model.stages:
        found[stage.device] = found.get(stage.device, 0) + layer * stage.layers
    return found


def _check(wanted: Mapping[torch.device, int], held: Mapping[torch.device, int], what: str, how: str) -> None:
    """Raise UserError if a device has too little memory.

    Args:
        wanted: Bytes needed on each device.
        held: Bytes of unused caches on each device, which the request can take over.
        what: Start of the message, such as "the models need".
        how: End of the message: what the user can do.
    """
    for device, size in wanted.items():
        have = free_bytes(device) + held.get(device, 0)
        if size > have:
            raise UserError(f"{what} about {size / GIB:.1f} GiB on {device}, but {have / GIB:.1f} GiB are free: {how}")
