"""Process groups for tensor parallelism and their collectives. Each rank holds a share of every text layer.

All ranks run the same loop on the same input. Decisions are computed from tensors that are equal on all ranks (sums,
gathered logits), or made on rank 0 and broadcast. Collectives on tensors run in the current stream and may be captured
in a CUDA graph. Every rank must call each of them, in the same order.

Shape suffixes: Q rows of a pass, N outputs of a layer, R ranks.
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
_JOINED = count()  # counts the groups joined so far, equally on all ranks
ROOM = 64  # rows of a symmetric buffer; an all-reduce of more rows is not fused


@dataclass(frozen=True)
class SymmetricBuffer:
    """Memory that all ranks can read and write, for the all-reduces of `engine/kernels/fused_all_reduce.py`.

    There is one per row width and dtype.

    Attributes:
        shares: (R,) address of each rank's two alternating buffers of rows, (2, ROOM, width).
        marks: (R,) address of each rank's (R, ROOM) int32 marks. Rank r sets entry (r, i) to the number of the
            all-reduce for which its row i is ready.
        turns: (ROOM,) int32, how many times each row has been all-reduced.
        held: Tensors that own the memory behind the addresses.
    """

    shares: Tensor
    marks: Tensor
    turns: Tensor
    held: tuple[Tensor, ...]


class ProcessGroup:
    """A group of one process, whose collectives return their input; base class of larger groups."""

    rank = 0
    size = 1

    def sum(self, share: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, in its own dtype."""
        return share

    def room(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer | None:
        """Return a buffer for fused all-reduces of (rows, width) tensors; None if the GPUs or `rows` forbid it."""
        return None

    def gather(self, share_QN: Tensor) -> Tensor:
        """Concatenate the columns of all ranks, in rank order: (Q, N) on each rank becomes (Q, N * R) on all."""
        return share_QN

    def first(self, tensor: Tensor) -> Tensor:
        """Broadcast rank 0's tensor, in place on the other ranks."""
        return tensor

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only and broadcast its result, which is pickled: keep it small and on the host."""
        return make()


SINGLE = ProcessGroup()


class ProcessRanks(ProcessGroup):
    """All processes of torch.distributed's default group, which must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.rooms: dict[tuple[int, torch.dtype], SymmetricBuffer] = {}
        self.reach = device.type == "cuda" and self._reach(device)

    def _reach(self, device: torch.device) -> bool:
        """Find out whether all ranks can allocate memory that all of them can read, by allocating a little."""
        others = [n for n in range(self.size) if n != device.index]
        mine = all(torch.cuda.can_device_access_peer(device, other) for other in others)
        if all(self._all(mine)):
            try:
                self._room(16, torch.float32, device)
            except RuntimeError:  # some drivers and containers do not support it
                mine = False
        return all(self._all(mine))

    def _all(self, mine: bool) -> list[bool]:
        """Gather a flag from every rank."""
        flags = [False] * self.size
        dist.all_gather_object(flags, mine)
        return flags

    def _room(self, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer:
        """Return the symmetric buffer for a width and dtype; make it on first use."""
        if (width, dtype) not in self.rooms:
            rows = symmetric_memory.empty(2, ROOM, width, dtype=dtype, device=device)
            marks = symmetric_memory.empty(self.size, ROOM, dtype=torch.int32, device=device).zero_()
            torch.cuda.synchronize(device)
            dist.barrier()  # the rendezvous below holds the GIL: a rank that died before it would go unnoticed
            held = [symmetric_memory.rendezvous(x, dist.group.WORLD.group_name) for x in (rows, marks)]  # type: ignore[union-attr]
            shares, places = (torch.tensor(handle.buffer_ptrs, device=device) for handle in held)
            turns = torch.zeros(ROOM, dtype=torch.int32, device=device)
            self.rooms[width, dtype] = SymmetricBuffer(shares, places, turns, (rows, marks))
        return self.rooms[width, dtype]

    def sum(self, share: Tensor) -> Tensor:
        dist.all_reduce(share)
        return share

    def room(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SymmetricBuffer | None:
        """Return a buffer; None if the GPUs cannot share memory or rows > ROOM.

        It is made on first use. That is never while a graph is captured, since a step runs once before its capture.
        """
        return self._room(width, dtype, device) if self.reach and rows <= ROOM else None

    def gather(self, share_QN: Tensor) -> Tensor:
        out = share_QN.new_empty(self.size * len(share_QN), share_QN.shape[1])
        dist.all_gather_into_tensor(out, share_QN.contiguous())
        return out.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)

    def first(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def share(self, make: Callable[[], T]) -> T:
        values = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(values, 0)
        return values[0]  # type: ignore[return-value]


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, Hugging Face's type of shared parameters; other tensors unchanged."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@contextmanager
def joined(device: torch.device, save: Callable[[], str] = str) -> Iterator[ProcessGroup]:
    """Join the ranks that torchrun started, over gloo on the CPU or over NCCL with one GPU per rank.

    If a rank dies, the others exit, and one of them says why in one line (see `Watch`).

    Args:
        device: This rank's device.
        save: Called on rank 0 when another rank runs out of memory, to save the results so far. Returns a text to add
            to the message.

    Yields:
        The group of all ranks.

    Raises:
        UserError: The ranks are on several machines, or the system is not Linux.
        Told: The block raised a UserError on a rank other than 0. Told replaces it, since rank 0 reports the error.
    """
    rank, size = torchrun.rank_here(), torchrun.size_here()
    if torchrun.several_machines():
        raise UserError("parallel=tensor takes the GPUs of one machine: start torchrun with --nnodes 1")
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        # Multicast gains nothing for few rows, and not every machine permits it.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    store, _, _ = next(rendezvous("env://"))
    name = f"specvlm-{next(_JOINED)}"  # a new prefix, since the store keeps the keys of earlier groups of this process
    watch = Watch(PrefixStore(f"{name}-watch", store.clone()), rank, size, save)
    try:
        shared, backend = PrefixStore(name, store), "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=shared, rank=rank, world_size=size, device_id=device if gpu else None)
        yield ProcessRanks(device)
        watch.ended()
        gc.collect()  # free captured collectives first, or destroying their process group hangs
        with watch.patience("the process group does not shut down"):
            dist.destroy_process_group()
    except BaseException as error:
        watch.failed(error)
        if rank and isinstance(error, UserError):
            raise Told(str(error)) from error
        raise
    finally:
        watch.close()
