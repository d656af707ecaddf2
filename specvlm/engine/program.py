"""Programs: functions of device tensors run repeatedly, as a CUDA graph, as traced operations, or directly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from specvlm.engine.recorded import Recorded
from specvlm.models.partition import current

if TYPE_CHECKING:
    from specvlm.engine.lean import LeanText
    from specvlm.models.kv_cache import KVCache


class CapturePool:
    """Memory pool and capture stream that all graphs of one device share.

    They may share memory because they never run at the same time, and they share a stream because torch reuses memory
    only within a stream. torch's default capture stream would not do: it belongs to whichever device captured first.
    """

    def __init__(self, device: torch.device) -> None:
        with current(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class Program:
    """Runs a function from fixed input buffers to fixed output buffers.

    The function must not read tensors on the host, and must do the same work for all values of its inputs: a capture
    fixes sizes and Python numbers. Capturing runs it on `inputs`, so a run on these must do no harm. Each later call
    copies its values into the same buffers.

    Inputs and outputs are on the device of the first input. The values of a call may come from another device; the
    copies are ordered with the current streams of both.

    Args:
        fn: Function to run.
        inputs: Example inputs.
        backend: "cudagraph"; "traced", a list of torch operations without the Python between them, to test on machines
            without a GPU what a graph would do; or "direct".
        capture_pool: Shared with other programs on the device; None makes one. Only for "cudagraph".
        tables: Owner of the other tensors that fn reads, model weights aside. A graph only knows their addresses and
            does not keep them alive.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        backend: str,
        capture_pool: CapturePool | None = None,
        tables: object = None,
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.device = self.inputs[0].device
        self.tables = tables
        self._staged: list[tuple[Tensor, torch.cuda.Event] | None] = [None] * len(self.inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._fn: Callable[..., Sequence[Tensor]] | None = None  # None for a graph, so as not to keep fn's cache alive
        self.outputs: list[Tensor] = []
        if backend != "cudagraph":
            self._fn = Recorded(fn, self.inputs) if backend == "traced" else fn
            return
        with current(self.device):
            self._capture(fn, capture_pool or CapturePool(self.device))

    def _capture(self, fn: Callable[..., tuple[Tensor, ...]], shared: CapturePool) -> None:
        # Warm up, so that compiled kernels, cuBLAS handles and device tables exist before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.outputs = [out.clone() for out in fn(*self.inputs)]
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: calls of other threads, such as NCCL's watchdog querying events, must not fail the capture.
        here = torch.cuda.stream(torch.cuda.current_stream())  # restores it if a capture fails, which torch does not do
        with here, torch.cuda.graph(self.graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"):
            for mine, out in zip(self.outputs, fn(*self.inputs), strict=True):
                mine.copy_(out)

    def __call__(self, *values: Tensor | Sequence[int] | None) -> list[Tensor]:
        """Run on new values; return the outputs, which the next call overwrites.

        values: One per input, a tensor or integers. None keeps the input's last value.
        """
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
        """Put integers into pinned memory, so that copying them to a GPU does not block.

        Waits for the previous copy of this input: a program may be called again before the host reads a result.
        """
        if buffer.device.type != "cuda":
            return torch.tensor(value)
        if (there := self._staged[number]) is None:
            pinned = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            there = self._staged[number] = pinned, torch.cuda.Event()
        staged, copied = there
        copied.synchronize()
        staged.numpy()[:] = value
        return staged


class Keeper(Protocol):
    """Interface of an engine that makes programs and keeps them (see `GraphsEngine`)."""

    backend: str
    capture_s: float

    def program(self, key: tuple[Hashable, ...], owner: KVCache | LeanText, build: Callable[[str], Program]) -> Program: ...

    def capture(
        self, fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], backend: str, tables: object = None
    ) -> Program: ...


def untested(device: torch.device) -> str:
    """Return a note if the device is a GPU older than Hopper, on which nothing was measured, else an empty string."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if capability >= (9, 0):
        return ""
    return f"engine=graphs is untested on {torch.cuda.get_device_name(device)}: it was measured on Hopper GPUs only"


def why_not_captured(device: torch.device) -> str | None:
    """Say why steps on a device cannot be captured; None if they can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, 8.0 is needed"
    try:
        from triton.language.extra.cuda import gdc_wait  # noqa: F401
    except ImportError:
        return "Triton is not installed, or older than 3.4"
    return None
