"""Which device holds what: worked out of the keys of a run and of what torchrun says, before anything is loaded."""

from dataclasses import dataclass

import torch

from specvlm.config import RunConfig
from specvlm.errors import UserError
from specvlm.parallel import torchrun
from specvlm.strategies import registry


@dataclass(frozen=True)
class Placement:
    """target: the devices of its layers in their order, or this rank's. draft: where the draft is; `first` where there is none.

    ranks: how many share the target. draft_shared: do they share the draft too? Else the first one has it alone.
    """

    parallel: str | None
    target: tuple[torch.device, ...]
    draft: torch.device
    ranks: int = 1
    draft_shared: bool = False

    @property
    def first(self) -> torch.device:
        return self.target[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(dict.fromkeys((*self.target, self.draft)))


def device_of(name: str, key: str = "device", otherwise: str = "device=cpu or device=auto") -> torch.device:
    """What `key` names, a GPU with its index. otherwise: what to use instead of a missing one. Raises UserError."""
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
    """Raises UserError for what cannot be had here, in one line."""
    parallel, named = cfg.target.parallel, cfg.device not in ("auto", "cpu", "cuda")
    if named and parallel:
        how = "set CUDA_VISIBLE_DEVICES"
        raise UserError(f"target.parallel={parallel} takes every GPU there is, not device={cfg.device}: {how}")
    if (count := torchrun.size_here()) > 1 and parallel != "tensor":
        raise UserError(f"torchrun started {count} ranks, which share a target: give target.parallel=tensor, or leave it out")
    device = device_of(cfg.device)
    drafts = registry.build("drafter", cfg.drafter).model == "draft"  # else what is said of the draft is not looked at
    draft = None
    if drafts and cfg.draft.device:
        draft = device_of(cfg.draft.device, "draft.device", "draft.device=cpu, or leave it out")
    if parallel == "layers":
        return _split(device, draft)
    if parallel == "tensor":
        return _shared(device, draft, drafts and cfg.draft.parallel == "tensor")
    return Placement(None, (device,), draft or device)


def _split(device: torch.device, draft: torch.device | None) -> Placement:
    if device.type != "cuda":
        raise UserError("target.parallel=layers splits a target over GPUs, and there is none to use")
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    mine = tuple(d for d in devices if d != draft)
    if len(mine) < 2:
        beside = f" beside draft.device={draft}" if draft else ""
        raise UserError(f"target.parallel=layers needs two GPUs or more{beside}, there is {len(mine)}: leave it out")
    return Placement("layers", mine, draft or mine[0])


def _shared(device: torch.device, draft: torch.device | None, draft_shared: bool) -> Placement:
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
        raise UserError(f"target.parallel=tensor takes the GPUs where there are some: {how}")
    if torchrun.rank_here():  # not to be touched from here: looking at another GPU's memory takes some of it
        draft = None
    return Placement("tensor", (device,), draft or device, ranks, draft_shared)
