"""Pairs over several GPUs: placement of random weights, and Hugging Face's `device_map` on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.models import memory_plan
from specvlm.models.partition import Stage, device_map, split, tensor_plan
from specvlm.models.video_lm import VideoLM
from specvlm.parallel.ranks import SINGLE, ProcessGroup, local_shard


def stages_for(layers: int, device: torch.device, beside: int) -> tuple[Stage, ...]:
    """Split a target's layers over all GPUs by free memory. beside: bytes to keep free on the first.

    On the CPU, make two stages, for tests.
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
    """Create a model on the meta device; for several ranks, sharded by Hugging Face as before loading weights."""
    with torch.device("meta"):
        hf = cls(config)
    if ranks.size > 1:
        from transformers.distributed import DistributedConfig

        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())  # untie it: the plan needs it by name
        wanted = DistributedConfig(tp_size=ranks.size, tp_plan=tensor_plan(config, ranks.size))
        found, _, mesh = cls.prepare_distribute_model(wanted)
        hf = cls.maybe_distribute_model(hf, found, mesh)
    return hf.eval().requires_grad_(False)


class Placement:
    """Device and random generator of each parameter. Replicated parameters get the same numbers on all ranks."""

    def __init__(self, hf: Any, stages: Sequence[Stage], seed: int, rank: int) -> None:
        self.rank, devices = rank, [stage.device for stage in stages]
        self.parts = device_map(hf, [stage.layers for stage in stages], devices)
        self.common = {device: torch.Generator(device).manual_seed(seed + n) for n, device in enumerate(devices)}
        self.mine = {
            device: torch.Generator(device).manual_seed(seed + 1000 * (rank + 1) + n) for n, device in enumerate(devices)
        }

    def of(self, name: str) -> torch.device:
        """Return the device of a parameter."""
        return next(device for part, device in self.parts.items() if f"{name}.".startswith(f"{part}."))


def as_share(like: Tensor, share: Tensor) -> Tensor:
    """Wrap a shard in a DTensor if the parameter it replaces is one; else return it as it is."""
    if local_shard(like) is like:
        return share
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@contextmanager
def restored(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end of a with block."""
    try:
        yield
    finally:
        undo()


@contextmanager
def hooked(lm: VideoLM) -> Iterator[None]:
    """Put accelerate's hooks on a pipelined model, as `device_map="auto"` does, with the same weights."""
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
