"""The Triton kernels compile for older GPUs ahead of time, in the shared memory that these have. Needs Triton, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from specvlm.engine.contexts import Contexts, Layout
from specvlm.engine.ops import Experts, Weight
from specvlm.models.quantize import quantize

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

LIMITS = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory of a program, by compute capability
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
HEADS = [(40, 8, 128), (4, 2, 48)]  # of the 32B, and of the embedded pairs


def compiled(capability: int, calls: list[tuple[str, int]], monkeypatch) -> None:
    """Replace launches by compilation for a GPU. calls: gets each kernel's name and its bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from specvlm.engine.kernels import launch

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k in self.arg_names}
        options = {k: v for k, v in named.items() if k not in self.arg_names and k != "launch_pdl"}
        signature, constants, hints = dict[str, str](), dict[str, Any](), dict[tuple[int], list[list[Any]]]()
        for at, parameter in enumerate(self.params):
            name, value = parameter.name, values[parameter.name]
            plain = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
                signature[name], constants[name] = "constexpr", value
                continue
            kind = NAMES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
            signature[name] = f"*{kind}" if isinstance(value, torch.Tensor) else kind
            if isinstance(value, torch.Tensor) or (kind == "i32" and value % 16 == 0 and not plain):
                hints[at,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=hints)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        calls.append((self.__name__, kernel.metadata.shared))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "small_limit", lambda: LIMITS[capability] if capability < 90 else None)


def attend(rows: int) -> None:
    from specvlm.engine import kernels

    for heads, kv_heads, width in HEADS:
        q = torch.empty(rows, heads, width, dtype=torch.bfloat16)
        keys, base = torch.empty(kv_heads, 2_000, width, dtype=torch.bfloat16), torch.tensor([1_900])
        kernels.attention(q, keys, keys, base, torch.eye(rows, dtype=torch.int8), 0.1)
        kernels.path_attention(q, keys, keys, base, torch.zeros(rows).long(), torch.zeros(rows, 6).long(), 0.1)
        kernels.path_attention_many(q, contexts_of(rows, kv_heads), 1, 0.1)
    kernels.top(torch.empty(rows, 32_000, dtype=torch.bfloat16), 8)


def contexts_of(rows: int, kv_heads: int) -> Contexts:
    """Make tables of the shapes that a pass of four requests has."""
    each, blocks = torch.zeros(rows).long(), torch.zeros(9, 3, dtype=torch.int32)
    layout = Layout(each.int(), each, each, each, torch.zeros(rows, 8).long(), blocks)
    return Contexts(torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4, 4).long(), layout, 4096, kv_heads)


def multiply(kind: str, rows: int) -> None:
    from specvlm.engine import kernels

    layers = [nn.Linear(1024, outputs, bias=False, dtype=torch.bfloat16) for outputs in (1024, 256, 21_504)]
    weights = [Weight.of(layer if kind == "full" else quantize(layer, kind)) for layer in layers]
    x = torch.empty(rows, 1024, dtype=torch.bfloat16)
    _, y = kernels.add_norm(x, None, torch.ones(1024, dtype=torch.bfloat16), 1e-6, kind)
    kernels.linear(y, (weights[0], weights[1], weights[1]))
    kernels.linear(y, (weights[2],), whole=torch.bfloat16)
    kernels.gated(y, weights[2], weights[2], torch.bfloat16, kind)


def send(kind: str, rows: int) -> None:
    """Run experts, and norms of queries and keys, at the sizes of Qwen3-VL-30B-A3B."""
    from specvlm.engine import kernels

    sizes = (2048, 128), (2048, 1536), (768, 2048)  # of one expert: compiling does not read weights
    layers = [nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in sizes]
    stacks = (Weight.of(layer if kind == "full" else quantize(layer, kind)) for layer in layers[1:])
    layer = Experts(Weight.of(layers[0]), *stacks, 8)
    kernels.experts(torch.empty(rows, 2048, dtype=torch.bfloat16), layer)
    keys, turns, norm = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((4, 2_000, 128), (rows, 64), (128,)))
    kernels.rope(torch.empty(2, rows, 40 * 128), (), turns, turns, keys, keys, torch.tensor([9]), 0, 32, (norm, norm), 1e-6)
    kernels.rope_many(torch.empty(2, rows, 40 * 128), (), turns, turns, contexts_of(rows, 4), 1, 32, (norm, norm), 1e-6)


def fuse(dtype: torch.dtype) -> None:
    """Run the operations between the products of towers and prefills, at the sizes of the 32B, its tower and Qwen3-VL-32B."""
    from specvlm.models import fused_kernels

    for width in (8192, 5120, 1280, 128):
        x = torch.empty(64, width, dtype=dtype)
        fused_kernels.norm(x, x[0], 1e-6)
        fused_kernels.add_norm(x, x, x[0], 1e-6)
        fused_kernels.gate(x, x)
    for heads, kv_heads, width, rounded, normed in ((40, 8, 128, True, 0), (64, 8, 128, True, 2), (16, 16, 80, False, 0)):
        q, k = (torch.empty(64, count, width, dtype=dtype) for count in (heads, kv_heads))
        turns = torch.empty(64, width, dtype=dtype if rounded else torch.float32)
        fused_kernels.turn(q, k, turns, turns, rounded, [q[0, 0]] * normed, 1e-6)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_forms_fit_the_gpu(capability, dtype, monkeypatch):
    check(capability, lambda: fuse(dtype), monkeypatch)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("width", [48, 64, 128])
def test_sums_of_attention_fit_the_gpu(capability, width, monkeypatch):
    from specvlm.models import attention_kernels

    query, key = torch.empty(8, 5, 50, width, dtype=torch.bfloat16), torch.empty(8, 3000, width, dtype=torch.bfloat16)

    def calls() -> None:
        attention_kernels.sums_of(query, key, 0.1)
        attention_kernels.sums_of(query, key, 0.1, 0, torch.ones(50))

    check(capability, calls, monkeypatch)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize(("kind", "rows"), [("full", 1), ("full", 26), ("full", 64), ("int8", 26), ("int4", 26), ("fp8", 26)])
def test_experts_fit_the_gpu(capability, kind, rows, monkeypatch):
    if kind == "fp8" and capability < 89:
        pytest.skip("fp8 needs compute capability 8.9")
    check(capability, lambda: send(kind, rows), monkeypatch)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("rows", [1, 26, 64])
def test_attention_fits_the_gpu(capability, rows, monkeypatch):
    check(capability, lambda: attend(rows), monkeypatch)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("kind", ["full", "int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 26, 64, 128])
def test_linear_layers_fit_the_gpu(capability, kind, rows, monkeypatch):
    if kind == "fp8" and capability < 89:
        pytest.skip("fp8 needs compute capability 8.9")
    check(capability, lambda: multiply(kind, rows), monkeypatch)


def check(capability: int, launch: Callable[[], None], monkeypatch) -> None:
    calls: list[tuple[str, int]] = []
    compiled(capability, calls, monkeypatch)
    launch()
    assert len(calls) >= 3
    assert [call for call in calls if call[1] > LIMITS[capability]] == []
