"""A pair over several GPUs: where its random weights are made, and Hugging Face's own way over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.app import memory_plan
from specvlm.models.partition import Stage, device_map, split, tensor_plan
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard


def stages_for(layers: int, device: torch.device, beside: int) -> tuple[Stage, ...]:
    """The layers of a target over all GPUs, by their free memory; beside: bytes that the first one shall keep free.

    On the CPU two stages of it, as a test.
    """
    devices = [device, device]
    room = [1.0, 1.0]
    if device.type == "cuda":
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        room = [float(memory_plan.free_bytes(d)) for d in devices]
        room[0] -= beside
    stages, start = [], 0
    for where, count in zip(devices, split(layers, room), strict=True):
        stages.append(Stage(where, start, start + count))
        start += count
    return tuple(stages)


def skeleton(cls: Any, config: Any, ranks: ProcessGroup = SINGLE) -> Any:
    """On the meta device; for ranks, its layers made shares by Hugging Face, as it does before it loads."""
    with torch.device("meta"):
        hf = cls(config)
    if ranks.size > 1:
        from transformers.distributed import DistributedConfig

        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())  # a tied one has no name of its own to plan for
        wanted = DistributedConfig(tp_size=ranks.size, tp_plan=tensor_plan(config, ranks.size))
        found, _, mesh = cls.prepare_distribute_model(wanted)
        hf = cls.maybe_distribute_model(hf, found, mesh)
    return hf.eval().requires_grad_(False)


class Placement:
    """Where each part of a model is made, and from which random numbers: those of what all ranks hold in full are the same."""

    def __init__(self, hf: Any, stages: Sequence[Stage], seed: int, rank: int) -> None:
        self.rank, devices = rank, [stage.device for stage in stages]
        self.parts = device_map(hf, [stage.layers for stage in stages], devices)
        self.common = {device: torch.Generator(device).manual_seed(seed + n) for n, device in enumerate(devices)}
        self.mine = {
            device: torch.Generator(device).manual_seed(seed + 1000 * (rank + 1) + n) for n, device in enumerate(devices)
        }

    def of(self, name: str) -> torch.device:
        return next(device for part, device in self.parts.items() if f"{name}.".startswith(f"{part}."))


def as_share(like: Tensor, share: Tensor) -> Tensor:
    """This rank's share of a parameter that Hugging Face has made a DTensor; of any other, all of it."""
    if local_shard(like) is like:
        return share
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@contextmanager
def restored(undo: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    finally:
        undo()


@contextmanager
def hooked(lm: VideoLM) -> Iterator[None]:
    """A split model with accelerate's hooks on it, as `from_pretrained(device_map="auto")` leaves it: over the same weights."""
    if len(lm.stages) == 1:
        yield
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    counts, devices = [stage.layers for stage in lm.stages], [stage.device for stage in lm.stages]
    placed = {n: d.index if d.type == "cuda" else d.type for n, d in device_map(lm.hf, counts, devices).items()}
    dispatch_model(lm.hf, placed, skip_keys=lm.hf._skip_keys_device_placement, force_hooks=True)
    with restored(lambda: remove_hook_from_submodules(lm.hf)):
        yield
