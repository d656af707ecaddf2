"""Kernels of joined passes in plain torch, for a CPU: they read and write caches by their addresses, as on a GPU.

Shape suffixes: those of `specvlm.engine.contexts`; J KV heads, C slots, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specvlm.engine import ops
from specvlm.engine.contexts import UNIT, Contexts


def at_address(anchor: Tensor, units: int, shape: tuple[int, ...]) -> Tensor:
    """View memory at an address, counted from the anchor's, as a tensor of the anchor's dtype."""
    size = torch.Size(shape).numel() * anchor.itemsize
    memory = (ctypes.c_char * size).from_address(anchor.data_ptr() + units * UNIT)
    return torch.frombuffer(memory, dtype=anchor.dtype).view(shape)


def parts_of(contexts: Contexts, layer: int, width: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield the rows of each request, the keys and values (J, C, D) of its cache's layer, and its base (1,)."""
    owners = contexts.layout.request_Q.tolist()
    for request, (keys, values, capacity, base) in enumerate(contexts.table_B4.tolist()):
        if request in owners:
            start, shape = owners.index(request), (layer + 1, contexts.kv_heads, capacity, width)
            both = (at_address(contexts.anchor, units, shape)[layer] for units in (keys, values))
            yield slice(start, start + owners.count(request)), *both, torch.tensor([base])


def rope_many(
    parts_SQN: Tensor, biases: tuple[Tensor, ...], cos_QD: Tensor, sin_QD: Tensor, contexts: Contexts, layer: int, heads: int,
    norms: tuple[Tensor, ...] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Do as `kernels.rope_many`."""
    width = 2 * cos_QD.shape[1]
    q_QHD = torch.zeros(parts_SQN.shape[1], heads, width, dtype=contexts.anchor.dtype)
    for rows, keys, values, base in parts_of(contexts, layer, width):
        at = int(contexts.layout.local_Q[rows.start])
        given = parts_SQN[:, rows], biases, cos_QD[rows], sin_QD[rows]
        q_QHD[rows] = ops.rope(*given, keys, values, base, at, heads, norms, eps)
    return q_QHD


def path_attention_many(q_QHD: Tensor, contexts: Contexts, layer: int, scale: float, kind: str = "full") -> Tensor:
    """Do as `kernels.path_attention_many`."""
    layout, out_QN = contexts.layout, torch.zeros_like(q_QHD).flatten(1)
    for rows, keys, values, base in parts_of(contexts, layer, q_QHD.shape[-1]):
        ways_QP, above_Q = layout.ways_QP[rows], layout.above_Q[rows]
        on_QP = torch.arange(ways_QP.shape[1]) <= above_Q[:, None]
        last = int(ways_QP[on_QP].max()) + 1
        seen_QT = torch.zeros(len(ways_QP), last + 1, dtype=torch.int8).scatter_(1, torch.where(on_QP, ways_QP, last), 1)
        out_QN[rows] = ops.attention(q_QHD[rows], keys, values, base, seen_QT[:, :last], scale)
    return out_QN


def move(anchor: Tensor, where_3B: Tensor, request: int, base_1: Tensor, path_D: Tensor, heads: int, width: int) -> None:
    """Do as `kernels.move`."""
    *both, capacity = where_3B.view(-1, 3)[request].tolist()
    for units in both:
        rows = at_address(anchor, units, (heads, capacity, width))
        rows[:, base_1 + torch.arange(len(path_D))] = rows[:, base_1 + path_D]


def install(monkeypatch: Any) -> None:
    """Let engines run passes of several requests joined, on a CPU."""
    own = {"rope_many": rope_many, "path_attention_many": path_attention_many, "move": move}
    found = SimpleNamespace(**{name: value for name, value in vars(ops).items() if not name.startswith("_")} | own)
    monkeypatch.setattr("specvlm.engine.cuda_graphs.kernels_for", lambda model, lean: found)
