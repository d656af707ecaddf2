"""Assign devices to target and draft, from the keys of a run and torchrun's environment."""

from dataclasses import dataclass

import torch

from specvlm.config import RunConfig
from specvlm.errors import UserError
from specvlm.parallel import torchrun
from specvlm.strategies import registry


@dataclass(frozen=True)
class Placement:
    """Devices of target and draft.

    Attributes:
        parallel: "layers", "tensor", or None for a single device.
        target: Devices of the target's layers in order; this rank's device if tensor-parallel.
        draft: Device of the draft; `first` unless draft.device names another.
        ranks: Number of tensor-parallel ranks; 1 without them.
        draft_shared: Whether the draft is tensor-parallel too; else rank 0 alone holds it.
    """

    parallel: str | None
    target: tuple[torch.device, ...]
    draft: torch.device
    ranks: int = 1
    draft_shared: bool = False

    @property
    def first(self) -> torch.device:
        """Device of the target's first layer."""
        return self.target[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Devices of target and draft in this process, each once."""
        return tuple(dict.fromkeys((*self.target, self.draft)))


def device_of(name: str, key: str = "device", otherwise: str = "device=cpu or device=auto") -> torch.device:
    """Parse a device name and check that the device exists.

    Args:
        name: Name such as auto, cpu, cuda or cuda:1.
        key: The key that gave the name, for the error message.
        otherwise: Advice for the error message.

    Raises:
        UserError: There is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{key}={name}: there are {count} CUDA devices here; use {otherwise}")
    return device


def places_of(cfg: RunConfig) -> Placement:
    """Assign devices as `cfg` asks. Raises UserError if its keys conflict, or if devices or ranks are missing."""
    parallel, named = cfg.target.parallel, cfg.device not in ("auto", "cpu", "cuda")
    if named and parallel:
        how = "set CUDA_VISIBLE_DEVICES"
        raise UserError(f"target.parallel={parallel} uses every GPU, not device={cfg.device}: {how}")
    if (count := torchrun.size_here()) > 1 and parallel != "tensor":
        raise UserError(f"torchrun started {count} ranks: give target.parallel=tensor, or run without torchrun")
    device = device_of(cfg.device)
    drafts = registry.build("drafter", cfg.drafter).model == "draft"  # other drafters ignore the keys of the draft
    draft = None
    if drafts and cfg.draft.device:
        draft = device_of(cfg.draft.device, "draft.device", "draft.device=cpu, or leave it out")
    if parallel == "layers":
        return _split(device, draft)
    if parallel == "tensor":
        return _shared(device, draft, drafts and cfg.draft.parallel == "tensor")
    return Placement(None, (device,), draft or device)


def _split(device: torch.device, draft: torch.device | None) -> Placement:
    """Placement for target.parallel=layers: the target on all GPUs but draft.device.

    Raises UserError if these are fewer than two.
    """
    if device.type != "cuda":
        raise UserError("target.parallel=layers splits a target over GPUs, but there is no GPU")
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    mine = tuple(d for d in devices if d != draft)
    if len(mine) < 2:
        beside = f" beside draft.device={draft}" if draft else ""
        raise UserError(f"target.parallel=layers needs two GPUs or more{beside}, but there is {len(mine)}: leave it out")
    return Placement("layers", mine, draft or mine[0])


def _shared(device: torch.device, draft: torch.device | None, draft_shared: bool) -> Placement:
    """Placement for target.parallel=tensor: a GPU per rank, or the CPU if no GPU is visible.

    Raises UserError if there are fewer than two ranks, too few GPUs, or the draft's device is a rank's.
    """
    ranks = torchrun.size_here()
    if ranks < 2:
        raise UserError("target.parallel=tensor needs two ranks or more: torchrun --nproc-per-node 2 -m specvlm …")
    if device.type == "cuda":
        local, there = torchrun.local_rank(), torch.cuda.device_count()
        if ranks > there:
            raise UserError(f"torchrun started {ranks} ranks for {there} GPUs: use --nproc-per-node {there}")
        if draft is not None and draft.type == "cuda" and (draft.index or 0) < ranks:
            raise UserError(f"draft.device={draft} is the GPU of a rank: name one from cuda:{ranks} on, or leave it out")
        device = torch.device("cuda", local)
    elif torch.cuda.is_available():
        how = "hide them with CUDA_VISIBLE_DEVICES= for the CPU"
        raise UserError(f"target.parallel=tensor uses GPUs if there are any: {how}")
    if torchrun.rank_here():  # only rank 0 uses the draft's device; a mere query of its free memory would allocate some
        draft = None
    return Placement("tensor", (device,), draft or device, ranks, draft_shared)
