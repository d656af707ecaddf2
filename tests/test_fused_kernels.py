"""The kernels of fused forms against Hugging Face's modules: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).

The interpreter cuts numbers off where bfloat16 is meant to be rounded, so there the tests are in float16.
"""

from __future__ import annotations

import copy

import plain_forms
import pytest
import torch
from kernel_device import DEVICE, DTYPES  # before the kernels: it skips where they cannot run

from specvlm.models import fused_kernels
from specvlm.models.fused import Forms
from specvlm.testing import tiny

pytestmark = pytest.mark.slow  # in the interpreter
WIDTHS = [8, 128, 1280, 3456, 5120, 8192]


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def steps(ours: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Count the numbers of a dtype from one value to the other."""
    bits = (x.contiguous().view(torch.int16).int() for x in (ours, right))
    first, second = (torch.where(x < 0, -(x & 0x7FFF), x) for x in bits)
    return (first - second).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@torch.inference_mode()
def test_norms_are_those_of_the_modules(width, dtype):
    """Equal, but for sums that are rounded in another order: then single values are one step off, of scale and of product."""
    x, added, weight = (rows(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(5, width), (5, width), (width,)]))
    total, y = fused_kernels.add_norm(x, added, weight, 1e-6)
    assert torch.equal(total, x + added)
    for ours, right in (
        (y, plain_forms.norm(total, weight, 1e-6)),
        (fused_kernels.norm(x, weight, 1e-6), plain_forms.norm(x, weight, 1e-6)),
    ):
        off = steps(ours, right)
        assert off.max() <= 2 and (off > 0).sum() <= 1 + 2e-3 * off.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 3456), (3, 4097)])
@torch.inference_mode()
def test_gates_are_those_of_the_modules(shape, dtype):
    gate, up = 3 * rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1)
    want, held = plain_forms.gate(gate.clone(), up), up.clone()
    ours = fused_kernels.gate(gate, up)
    off = steps(ours, want)
    assert ours is gate and torch.equal(up, held)
    assert off.max() <= 2 and (off > 0).sum() <= 1 + 2e-3 * off.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(40, 8, 128), (28, 4, 128), (3, 1, 8), (16, 16, 80), (9, 9, 48)])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@torch.inference_mode()
def test_turns_are_those_of_the_modules(heads, kv_heads, width, rounded, packed, dtype):
    """Bit for bit; and in rows that lie in one tensor with the values, these stay."""
    angles = 20 * rows(5, width, dtype=torch.float32)  # of unlike halves, which the modules would take as well
    turns = [angle.to(dtype) if rounded else angle for angle in (angles.cos(), angles.sin())]
    whole = rows(5, heads + 2 * kv_heads, width, dtype=dtype)
    want = whole.clone()
    plain_forms.turn(want[:, :heads], want[:, heads : heads + kv_heads], *turns, rounded)
    q, k, _ = whole.split([heads, kv_heads, kv_heads], 1)
    q, k = (q, k) if packed else (q.clone(), k.clone())
    fused_kernels.turn(q, k, *turns, rounded)
    assert torch.equal(q, want[:, :heads]) and torch.equal(k, want[:, heads : heads + kv_heads])
    assert torch.equal(whole[:, heads + kv_heads :], want[:, heads + kv_heads :])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_norms_of_heads_come_before_turns(dtype):
    q, k, turns = rows(5, 9, 128, dtype=dtype), rows(5, 2, 128, dtype=dtype, seed=1), rows(2, 5, 128, dtype=dtype, seed=2)
    norms, want = [*rows(2, 128, dtype=dtype, seed=3)], (q.clone(), k.clone())
    plain_forms.turn(*want, *turns, True, norms, 1e-6)
    fused_kernels.turn(q, k, *turns, True, norms, 1e-6)
    off = torch.cat([steps(ours, right).flatten() for ours, right in zip((q, k), want, strict=True)])
    assert (off > 0).sum() <= 1 + 5e-3 * off.numel()
    torch.testing.assert_close(q, want[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    x, added, weight = rows(33, 1280, dtype=dtype), rows(33, 1280, dtype=dtype, seed=1), rows(1280, dtype=dtype, seed=2)
    turns = rows(2, 33, 80, dtype=torch.float32, seed=3)

    def run(some: slice) -> list[torch.Tensor]:
        given = [part[some].clone() for part in (x, added)]
        q, k = (part.clone().unflatten(-1, (16, 80)) for part in given)
        fused_kernels.turn(q, k, turns[0, some], turns[1, some], False)
        return [*fused_kernels.add_norm(*given, weight, 1e-6), fused_kernels.gate(*given), q, k]

    together, alone = run(slice(None)), [run(slice(row, row + 1)) for row in range(33)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(together, *alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl", "qwen3_vl_moe"])
@torch.inference_mode()
def test_a_model_runs_in_these_forms(family, dtype):
    """All forms pass their trial, and a prefill is as near to that of the modules as rounding leaves it."""
    lm, prompt = tiny.wrapped(copy.deepcopy(tiny.model(family).hf).to(DEVICE, dtype)), tiny.prompt(family)
    lm.forms = Forms(lm.hf, lm.axes, plain_forms)
    counts, found = lm.forms.counts, []
    for forms in (Forms(lm.hf, lm.axes, fused_kernels), lm.forms):
        assert forms.counts == counts
        lm.forms = forms
        embeds, cache = lm.embed(prompt, lm.features(prompt)), lm.new_cache(len(prompt))
        found.append(lm.prefill(embeds, lm.positions(prompt), cache, prompt.cut).double())
    assert (found[0] - found[1]).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * found[1].norm()
