"""Triton kernels for passes of few rows, where a step costs the bytes of the weights and the keys it reads.

Every kernel may be captured in a CUDA graph: what changes from pass to pass (the length of the prefix) is read from
the device. With `launch.PDL` a kernel may be scheduled before its predecessor has ended (programmatic dependent launch): each
lets its successor come at once, and waits for its predecessor before it touches anything but weights. Since every
kernel waits, the one after next waits for both, and the order of memory is that of the stream.

Shape suffixes: Q rows, K inputs, N outputs, S parts of a split sum, H query heads, J KV heads, G = H / J, D head width,
C slots of a cache, T rows of the tree, V vocabulary.

The plain forms of the same functions, which the tests compare with, are in `engine/ops.py`.
"""

from __future__ import annotations

from specvlm.engine.kernels.flash_decoding import attention
from specvlm.engine.kernels.fused_all_reduce import all_reduce_add_norm
from specvlm.engine.kernels.launch import GROUP
from specvlm.engine.kernels.layers import gated, linear, why_not
from specvlm.engine.kernels.norm_rope import add_norm, rope, whole
from specvlm.engine.kernels.path_decoding import path_attention
from specvlm.engine.kernels.topk import top

__all__ = [
    "GROUP",
    "add_norm",
    "all_reduce_add_norm",
    "attention",
    "gated",
    "linear",
    "path_attention",
    "rope",
    "top",
    "whole",
    "why_not",
]
