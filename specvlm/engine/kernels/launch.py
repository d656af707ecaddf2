"""How kernels are launched, and rows in 8 bits, which several of them write or read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PDL = True  # off in Triton's interpreter, which knows no such launch
GROUP = 128  # values of a row in 8 bits that share a scale: a tile of k, a head, a tile of the gated layer


@triton.jit
def to_8_bits(y, y_ptr):
    """Values (GROUP, n) in the 8 bits of y_ptr's type, and a scale for each column."""
    kind = y_ptr.dtype.element_ty
    largest: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
    scale = tl.maximum(tl.max(tl.abs(y), 0) / largest, 1e-20)
    narrow = y / scale[None, :]
    if kind == tl.int8:
        narrow = tl.floor(narrow + 0.5)
    return narrow.to(kind), scale


@dataclass(frozen=True)
class Tile:
    """How a linear layer of few rows is cut: outputs and inputs of a tile, tiles in flight, warps of a program."""

    outputs: int = 64
    inputs: int = 128
    stages: int = 4
    warps: int = 4


@dataclass(frozen=True)
class Narrow:
    """Rows in 8 bits: data (Q, K) int8 or float8, scale (Q, K / GROUP). What weights in 8 or 4 bits are multiplied with."""

    data: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Narrow:
        return Narrow(self.data[rows].contiguous(), self.scale[rows].contiguous())

    @classmethod
    def empty(cls, rows: int, width: int, kind: str, device: torch.device) -> Narrow:
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        data = torch.empty(rows, width, dtype=dtype, device=device)
        return cls(data, torch.empty(rows, width // GROUP, dtype=torch.float32, device=device))


def options_of(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "PDL": PDL, **({"launch_pdl": True} if PDL else {})}


def width_of(rows: int) -> int:
    """Rows as the tensor cores take them."""
    return max(16, triton.next_power_of_2(rows))


def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split(x: Tensor | Narrow) -> tuple[Tensor, Tensor]:
    return (x.data, x.scale) if isinstance(x, Narrow) else (x, x)
