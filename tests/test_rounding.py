"""The rounding bound: no summation order exceeds it, and real differences do."""

from __future__ import annotations

import pytest
import tiny
import torch
from rounding import additions, assert_same_sums, rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 192, 5000])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_order_of_adding_up_is_outside_of_the_bound(dtype, count, offset):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype) + offset
    size, exact = float(x.double().abs().sum()), x.double().sum()
    orders = [x, x.flip(0), x.sort().values, x[x.abs().argsort(descending=True)]]
    one_by_one = [ordered.cumsum(0)[-1] for ordered in orders]
    in_blocks = [torch.stack([part.sum() for part in ordered.split(7)]).sum() for ordered in orders]
    for found in one_by_one + in_blocks:
        assert_same_sums(found, exact, count, size)


def test_a_sum_near_zero_is_bounded_by_what_was_added_up():
    """A fixed bound got this wrong: values up to 143, a sum near 0, and a difference of 5e-5."""
    x = torch.randn(192, generator=torch.Generator().manual_seed(0)) * 50
    x[-1] = -x[:-1].double().sum()
    assert abs(float(x.sum())) < 1e-2 and rounding(192, float(x.abs().sum()), torch.float32) > 5e-5
    assert_same_sums(x.sum(), x.flip(0).cumsum(0)[-1], 192, float(x.abs().sum()))


@pytest.mark.parametrize("fault", [lambda x: x[:-1], lambda x: x * 1.001, lambda x: torch.cat([x, x[:1]])])
def test_a_term_too_few_or_too_many_or_scaled_is_outside(fault):
    x = 1 + torch.rand(192, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        assert_same_sums(fault(x).sum(), x.sum(), 192, float(x.sum()))


def test_the_coarser_dtype_counts():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert_same_sums(third.bfloat16(), third, 1)
    with pytest.raises(AssertionError):
        assert_same_sums(third.bfloat16().double(), third, 1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_additions_count_columns_and_keys(family):
    model = tiny.model(family).hf
    one, other = additions(model, 0), additions(model, 10)
    layers = len(model.model.language_model.layers)
    vision = getattr(model.config.vision_config, "depth", None) or model.config.vision_config.num_hidden_layers
    assert other - one == 10 * (layers + vision)
    assert one > layers * model.config.text_config.hidden_size * 6
