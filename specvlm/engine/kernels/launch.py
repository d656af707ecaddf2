"""Launch options, and 8-bit rows, which several kernels read or write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PDL = True  # programmatic dependent launch; off in Triton's interpreter, which lacks it
GROUP = 128  # values of an 8-bit row that share a scale: a tile of k, a head, or a part of the gated layer's output


@triton.jit
def to_8_bits(y, y_ptr):
    """Quantise (GROUP, n) values to y_ptr's 8-bit type, with one scale per column. Returns values and (n,) scales."""
    kind = y_ptr.dtype.element_ty
    largest: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    scale = tl.maximum(tl.max(tl.abs(y), 0) / largest, 1e-20)
    narrow = y / scale[None, :]
    if kind == tl.int8:
        narrow = tl.floor(narrow + 0.5)
    return narrow.to(kind), scale


@triton.jit
def context_of(table_ptr, k_ptr, v_ptr, request, layer, J: tl.constexpr, D: tl.constexpr):
    """Return a request's context (see `engine/contexts.py`): pointers to a layer's keys and values, `base`, capacity.

    k_ptr and v_ptr are the anchor. Products by 8 tell the compiler that addresses are multiples of 16 bytes.
    """
    at = table_ptr + request * 4
    keys = tl.load(at)
    values = tl.load(at + 1)
    capacity = tl.load(at + 2).to(tl.int32)
    base = tl.load(at + 3).to(tl.int32)
    earlier = layer.to(tl.int64) * J * capacity * D
    return k_ptr + keys * 8 + earlier, v_ptr + values * 8 + earlier, base, capacity


@dataclass(frozen=True)
class Tile:
    """Tiling of a linear layer, and launch options of any kernel.

    Attributes:
        outputs: Number of outputs of a tile. Only linear layers use it.
        inputs: Number of inputs of a tile. Only linear layers use it.
        stages: Number of tiles in flight (pipeline stages).
        warps: Number of warps of a program.
    """

    outputs: int = 64
    inputs: int = 128
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True)
class Narrow:
    """Rows in 8 bits, to be multiplied with weights in 8 or 4 bits.

    Attributes:
        data: (Q, K) int8 or float8.
        scale: (Q, K / GROUP) float32, one for every GROUP neighbouring values.
    """

    data: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Narrow:
        return Narrow(self.data[rows].contiguous(), self.scale[rows].contiguous())

    @classmethod
    def joined(cls, pieces: Sequence[Narrow]) -> Narrow:
        """Join the rows of several passes."""
        dtype = pieces[0].data.dtype
        data = torch.cat([piece.data.view(torch.uint8) for piece in pieces]).view(dtype)  # as bytes, which torch can join
        return cls(data, torch.cat([piece.scale for piece in pieces]))

    @classmethod
    def empty(cls, rows: int, width: int, kind: str, device: torch.device) -> Narrow:
        """Allocate rows for weights of a kind: float8 for "fp8", int8 for "int8" and "int4"."""
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        data = torch.empty(rows, width, dtype=dtype, device=device)
        return cls(data, torch.empty(rows, width // GROUP, dtype=torch.float32, device=device))


def options_of(tile: Tile, stage_bytes: int = 0, other_bytes: int = 0) -> dict[str, Any]:
    """Return a kernel's keyword arguments for a tiling: warps, stages and PDL.

    On a GPU with less shared memory than Hopper, there is no dependent launch, and fewer stages run if they do not fit.
    The number of stages changes no bit of a result.

    Args:
        tile: The tiling, tuned on Hopper.
        stage_bytes: Shared memory that a stage takes.
        other_bytes: Other shared memory that the kernel takes.
    """
    limit, stages, dependent = small_limit(), tile.stages, PDL
    if limit is not None:
        dependent = False
        while stages > 1 and stages * stage_bytes + other_bytes > limit:
            stages -= 1
    return {"num_warps": tile.warps, "num_stages": stages, "PDL": dependent, **({"launch_pdl": True} if dependent else {})}


def small_limit() -> int | None:
    """Return the shared memory of a program in bytes if the current GPU has less than Hopper, else None."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    if (9, 0) <= capability < (12, 0):
        return None
    return 166_912 if capability in ((8, 0), (8, 7)) else 101_376  # CUDA's guide: 163 KiB, else 99 KiB


def width_of(rows: int) -> int:
    """Pad a number of rows to what tensor cores take: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rows))


def processors_of(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 4 on a CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split(x: Tensor | Narrow) -> tuple[Tensor, Tensor]:
    """Return data and scale of 8-bit rows. Other rows are returned twice, since kernels then ignore the scale."""
    return (x.data, x.scale) if isinstance(x, Narrow) else (x, x)
