"""Triton kernels for passes of few rows, which are bound by reading weights and the KV cache.

Every kernel can be captured in a CUDA graph: it reads what changes between passes, such as the prefix length, from the
device. With `launch.PDL` (programmatic dependent launch), a kernel may start before its predecessor has ended. Each
kernel lets its successor start early, and waits for its predecessor before it reads anything but weights or writes
anything. Since every kernel waits, memory operations keep the order of the stream.

The argument `kind` of a function is the storage type of the weights that its result will be multiplied with (see
`ops.Weight`). Unless that is "full", the result is in 8 bits (`launch.Narrow`).

Shape suffixes: Q rows, K inputs, N outputs, S parts of a split sum, H query heads, J KV heads, G = H / J, D head width,
C cache slots, T tree rows, V vocabulary.

`engine/ops.py` has the same operations in plain torch. The tests compare the two.
"""

from __future__ import annotations

from specvlm.engine.kernels.experts import experts
from specvlm.engine.kernels.flash_decoding import attention
from specvlm.engine.kernels.fused_all_reduce import all_reduce_add_norm
from specvlm.engine.kernels.launch import GROUP
from specvlm.engine.kernels.layers import gated, linear, why_not
from specvlm.engine.kernels.move import move
from specvlm.engine.kernels.norm_rope import add_norm, rope, rope_many, whole
from specvlm.engine.kernels.path_decoding import path_attention, path_attention_many
from specvlm.engine.kernels.topk import top

__all__ = [
    "GROUP",
    "add_norm",
    "all_reduce_add_norm",
    "attention",
    "experts",
    "gated",
    "linear",
    "move",
    "path_attention",
    "path_attention_many",
    "rope",
    "rope_many",
    "top",
    "whole",
    "why_not",
]
