"""Assign devices to target and draft, from the keys of a run and torchrun's environment."""

import torch

from specvlm.config import RunConfig
from specvlm.errors import UserError
from specvlm.models.placement import Placement, device_of
from specvlm.parallel import torchrun
from specvlm.strategies import registry


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
    """Placement for target.parallel=layers: the target on all GPUs except draft.device.

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

    Raises UserError if there are fewer than two ranks, too few GPUs, or the draft's device belongs to a rank.
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
