"""Recorded operations: the same work on other inputs, on the same tensors from elsewhere, and never a look at a value."""

from __future__ import annotations

import pytest
import torch

from specvlm.engine.recorded import Recorded

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=chance), torch.randint(4, (2,), generator=chance)


def several(x, rows):
    """Views, lists of tensors, constants, operations in place, an input that is also an output."""
    left, right = (x @ WEIGHT).split(2, -1)
    left += torch.tensor([1.0, 2.0])
    table = torch.zeros(4, 2)
    table[rows] = torch.cat([left, right])[rows]
    table.T.mul_(2)
    return table, torch.stack([left, right], dim=-1).sum(-1), rows, x.topk(k=2, dim=-1).indices


def test_it_does_the_same_to_other_inputs_time_and_again():
    run = Recorded(several, drawn(0))
    for seed in (0, 1, 2, 1):
        expected = several(*drawn(seed))
        for mine, right in zip(run(*drawn(seed)), expected, strict=True):
            assert torch.equal(mine, right)


def test_tensors_from_elsewhere_are_read_and_written_where_they_are():
    store, places = torch.zeros(3), []

    def keep(x):
        places.append(1)
        store[1:].add_(x)
        return (store + x,)

    run = Recorded(keep, [torch.ones(2)[:1]])
    store.fill_(5)
    (found,) = run(torch.full((1,), 2.0))
    assert store.tolist() == [5, 7, 7] and found.tolist() == [7, 9, 9] and places == [1]


LOOKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x[0]),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_value_is_refused(look, inference):
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match="reads a tensor on the host"):
        Recorded(lambda x: (x, look(x))[:1], [torch.ones(3)])
