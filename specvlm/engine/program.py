"""A function of device tensors as something to run again and again: as it is, compiled, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specvlm.models.partition import current


class CapturePool:
    """What captures on one device share: memory, since their graphs never run at the same time, and the stream, since memory is
    reused within one alone. torch's own stream for captures is of the device that came first.
    """

    def __init__(self, device: torch.device) -> None:
        with current(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class Program:
    """fn over fixed input buffers into fixed output buffers.

    fn must not depend on anything the host could change: no sizes, no Python numbers, no reads. To be captured it is run on
    the `inputs` given here, so those must be harmless; every later call copies its values into the same buffers.

    backend: "cudagraph"; "traced", a list of torch operations with all that is Python's gone, as a graph has it, for machines
    without a GPU; "direct".
    All is on the first input's device, which is made the current one here; values may come from another, in the order of both
    streams. lane: shared with other programs of that device. tables: what holds the tensors that fn reads beside its inputs and
    the models' weights: a graph knows their addresses, and keeps nothing alive.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        backend: str,
        lane: CapturePool | None = None,
        tables: object = None,
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.device = self.inputs[0].device
        self.tables = tables
        self._staged: list[tuple[Tensor, torch.cuda.Event] | None] = [None] * len(self.inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._fn: Callable[..., tuple[Tensor, ...]] | None = None  # a graph has no need of it, nor of the cache it holds
        self.outputs: list[Tensor] = []
        if backend != "cudagraph":
            self._fn = fn
            if backend == "traced":  # raises RuntimeError where fn reads a tensor on the host
                from torch.fx.experimental.proxy_tensor import make_fx

                self._fn = make_fx(fn)(*self.inputs)
            return
        with current(self.device):
            self._capture(fn, lane or CapturePool(self.device))

    def _capture(self, fn: Callable[..., tuple[Tensor, ...]], lane: CapturePool) -> None:
        # What is made at first use (compiled kernels, cuBLAS handles, tables on the device) is made before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.outputs = [out.clone() for out in fn(*self.inputs)]
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do, such as NCCL's watchdog asking for its events, is none of this capture's business.
        here = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails leaves its own stream the current one
        with here, torch.cuda.graph(self.graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local"):
            for mine, out in zip(self.outputs, fn(*self.inputs), strict=True):
                mine.copy_(out)

    def __call__(self, *values: Tensor | Sequence[int] | None) -> list[Tensor]:
        """The outputs, which the next call overwrites. None leaves an input as it is; integers go in by one small copy."""
        for number, (buffer, value) in enumerate(zip(self.inputs, values, strict=True)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                value = self._stage(number, buffer, value)
            buffer.copy_(value, non_blocking=True)
            if (staged := self._staged[number]) is not None:
                staged[1].record(torch.cuda.current_stream(self.device))
        with current(self.device):
            if self.graph is not None:
                self.graph.replay()
            elif self._fn is not None:
                outs = self._fn(*self.inputs)
                self.outputs = self.outputs or [out.clone() for out in outs]
                for mine, out in zip(self.outputs, outs, strict=True):
                    mine.copy_(out)
        return self.outputs

    def _stage(self, number: int, buffer: Tensor, value: Sequence[int]) -> Tensor:
        """Pinned memory, so that the copy does not wait. It is written again only when the copy before has been made: a routine
        may be called several times before the host reads a result.
        """
        if buffer.device.type != "cuda":
            return torch.tensor(value)
        if (there := self._staged[number]) is None:
            pinned = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            there = self._staged[number] = pinned, torch.cuda.Event()
        staged, copied = there
        copied.synchronize()
        for at, integer in enumerate(value):
            staged[at] = integer
        return staged


def why_not_captured(device: torch.device) -> str | None:
    """What keeps steps on a device from being captured; None when nothing does."""
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:  # the kernels are scheduled by programmatic dependent launch, which older ones do not know
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, 9.0 is needed"
    try:
        from triton.language.extra.cuda import gdc_wait  # noqa: F401
    except ImportError:
        return "Triton is not installed, or older than 3.4"
    return None
