"""The processes that hold one model together, each a share of every layer (tensor parallelism), and what passes between them.

All ranks run the same loop on the same input. What could differ is decided from tensors that are the same on all of them (sums,
gathered logits), or on the first rank, which tells the others. Collectives run in the stream of the work around them and may be
captured in a CUDA graph; each rank must come to each of them, in the same order.

Shape suffixes: Q rows of a pass, N outputs of a layer.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from specvlm.errors import Told, UserError
from specvlm.parallel import torchrun
from specvlm.parallel.watchdog import Watch

T = TypeVar("T")
_JOINED = count()  # in every rank alike
ROOM = 64  # most rows of a pass of the lean language model


@dataclass(frozen=True)
class SymmetricBuffer:
    """Memory of all ranks in which they meet, by one width and dtype (see `engine/kernels/fused_all_reduce.py`).

    shares: (R,) addresses of (2, ROOM, width) rows, each rank's. marks: (R,) addresses of (R, ROOM) int32, by who marked.
    turns: (ROOM,) int32, meetings of each row so far. held: what the addresses are of.
    """

    shares: Tensor
    marks: Tensor
    turns: Tensor
    held: tuple[Tensor, ...]


class ProcessGroup:
    """One process, alone: there is nobody to talk to, and nothing costs anything."""

    rank = 0
    size = 1

    def sum(self, share: Tensor) -> Tensor:
        """The sum over all ranks, in place, in the tensor's own dtype."""
        return share

    def room(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer | None:
        """Where ranks may meet to add up (rows, width); None where they cannot."""
        return None

    def gather(self, share_QN: Tensor) -> Tensor:
        """(Q, N * ranks): every rank's columns side by side."""
        return share_QN

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's, in place on the others."""
        return tensor

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank; elsewhere it is not called. Pickled, so keep it small and on the host."""
        return make()


SINGLE = ProcessGroup()


class ProcessRanks(ProcessGroup):
    """All processes of torch.distributed's default group, which must be there already."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.rooms: dict[tuple[int, torch.dtype], SymmetricBuffer] = {}
        self.reach = device.type == "cuda" and self._reach(device)

    def _reach(self, device: torch.device) -> bool:
        """Can all ranks have memory that all of them read? One without it is enough for a no."""
        others = [n for n in range(self.size) if n != device.index]
        mine = all(torch.cuda.can_device_access_peer(device, other) for other in others)
        if all(self._all(mine)):
            try:
                self._room(16, torch.float32, device)
            except RuntimeError:  # no driver or container gives it for certain
                mine = False
        return all(self._all(mine))

    def _all(self, mine: bool) -> list[bool]:
        told = [False] * self.size
        dist.all_gather_object(told, mine)
        return told

    def _room(self, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer:
        if (width, dtype) not in self.rooms:
            rows = symmetric_memory.empty(2, ROOM, width, dtype=dtype, device=device)
            marks = symmetric_memory.empty(self.size, ROOM, dtype=torch.int32, device=device).zero_()
            torch.cuda.synchronize(device)
            dist.barrier()  # what follows holds Python still: a rank that died before would be heard of by nobody
            held = [symmetric_memory.rendezvous(x, dist.group.WORLD.group_name) for x in (rows, marks)]  # type: ignore[union-attr]
            shares, places = (torch.tensor(handle.buffer_ptrs, device=device) for handle in held)
            turns = torch.zeros(ROOM, dtype=torch.int32, device=device)
            self.rooms[width, dtype] = SymmetricBuffer(shares, places, turns, (rows, marks))
        return self.rooms[width, dtype]

    def sum(self, share: Tensor) -> Tensor:
        dist.all_reduce(share)
        return share

    def room(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer | None:
        """Rooms are made outside of captures, since a step runs once before it is captured, and kept."""
        return self._room(width, dtype, device) if self.reach and rows <= ROOM else None

    def gather(self, share_QN: Tensor) -> Tensor:
        out = share_QN.new_empty(self.size * len(share_QN), share_QN.shape[1])
        dist.all_gather_into_tensor(out, share_QN.contiguous())
        return out.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)

    def first(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def share(self, make: Callable[[], T]) -> T:
        told = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(told, 0)
        return told[0]  # type: ignore[return-value]


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's share of a parameter that Hugging Face has spread over ranks as a DTensor; any other tensor as it is."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@contextmanager
def joined(device: torch.device, save: Callable[[], str] = str) -> Iterator[ProcessGroup]:
    """The ranks that torchrun started, joined for this block: gloo on the CPU, NCCL on GPUs, each of which is one rank's.

    When one of them dies, the others end with one line (see `watch`, also for `save`). Raises UserError for ranks on several
    machines, and Told on another rank than the first for a mistake of the caller's.
    """
    rank, size = torchrun.rank_here(), torchrun.size_here()
    if torchrun.several_machines():
        raise UserError("parallel=tensor takes the GPUs of one machine: start torchrun with --nnodes 1")
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        # Multicast gains nothing for few rows, and is not everybody's to use.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    store, _, _ = next(rendezvous("env://"))
    name = f"specvlm-{next(_JOINED)}"  # a store remembers: words of an earlier block, in the same process, are not for this one
    watch = Watch(PrefixStore(f"{name}-watch", store.clone()), rank, size, save)
    try:
        shared, backend = PrefixStore(name, store), "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=shared, rank=rank, world_size=size, device_id=device if gpu else None)
        yield ProcessRanks(device)
        watch.ended()
        gc.collect()  # captured collectives go before what they were captured with, or its end waits for theirs
        with watch.patience("the ranks cannot part"):
            dist.destroy_process_group()
    except BaseException as error:
        watch.failed(error)
        if rank and isinstance(error, UserError):
            raise Told(str(error)) from error
        raise
    finally:
        watch.close()
