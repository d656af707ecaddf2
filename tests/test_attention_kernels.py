"""The kernels that add up attention, against torch: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, DTYPES, GPU  # before the kernels: it skips where they cannot run

from specvlm.models import attention_kernels, attention_sums

pytestmark = pytest.mark.slow  # in the interpreter
SHAPES = [(1, 1, 1, 5, 16), (2, 3, 4, 300, 48), (2, 5, 33, 1100, 64), (1, 7, 64, 2200, 128), (4, 1, 7, 7, 80)]


def example(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as a pass hands them out (rows before heads) and keys as a cache has them (with slots behind), and weights."""
    heads, group, rows, keys, width = shape
    random = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(rows, heads * group, width, generator=random).to(DEVICE, dtype).transpose(0, 1)
    cache = torch.randn(heads, keys + 9, width, generator=random).to(DEVICE, dtype)
    return query.unflatten(0, (heads, group)), cache[:, :keys], torch.rand(rows, generator=random).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_sums_are_those_of_torch(shape, dtype):
    query, key, weights = example(shape, dtype)
    for first, weigh in ((0, weights), (0, None), (shape[2] - 1, None)):
        given = query, key, 0.3, first, weigh
        for ours, right in zip(attention_kernels.sums_of(*given), attention_sums._by_torch(*given), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_equal_rows_and_keys_give_equal_bits(dtype):
    query, key, weights = example(SHAPES[2], dtype)
    one = attention_kernels.sums_of(query, key, 0.3, 0, weights)
    other = attention_kernels.sums_of(query.clone(), key.clone(), 0.3, 0, weights.clone())
    assert all(map(torch.equal, one, other))


def test_kernels_run_on_a_gpu_in_16_bits_alone():
    kernels = attention_sums.kernel_for(torch.bfloat16, torch.device(DEVICE))
    assert kernels is (attention_kernels.sums_of if GPU else None)
    assert attention_sums.kernel_for(torch.float32, torch.device(DEVICE)) is None
