"""The contract, and that two layers are as good as all that lie between them."""

import pytest
import torch
from rounding import assert_same_sums
from specvlm_uv_prune import UVPrunePruner
from torch.nn.functional import cosine_similarity

from specvlm.models.sight import States
from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import KeepSet, TokenGrid


@pytest.mark.parametrize("fields", [{}, {"layer": 1}, {"depth": 1.0}])
def test_contract(fields):
    check_pruner(UVPrunePruner, **fields)


def test_the_telescoped_form_equals_the_sum_over_layers_and_text():
    torch.manual_seed(0)
    grid, layers, width = TokenGrid(3, 2, 4, newline=1), 6, 16
    video_index = torch.arange(4, 4 + len(grid))
    cut = 4 + len(grid)
    states_LSD = torch.randn(layers + 1, cut + 7, width, dtype=torch.float64).cumsum(0)
    pruner = UVPrunePruner(layer=5)

    score_N = torch.zeros(len(grid), dtype=torch.float64)
    for i in range(len(grid)):
        for j in range(7):
            for layer in range(1, 6):
                for sign, at in ((1, layer), (-1, layer - 1)):
                    pair = states_LSD[at, 4 + i], states_LSD[at, cut + j]
                    score_N[i] += sign * cosine_similarity(*pair, dim=0)

    states = States(video_index, cut, pruner.state_layer(layers))
    states.enter(states_LSD[0])
    for layer in range(1, layers + 1):
        states.observe(layer, states_LSD[layer])
    signal = states.similarity(states_LSD[0, video_index])
    assert_same_sums((signal[1] - signal[0]) * 7, score_N, terms=3 * width + 2 * layers * 7, size=2 * layers * 7)
    for budget in range(1, len(grid)):
        keep = pruner.select(PruneContext((grid,), budget, {"text_similarity": signal}))
        assert torch.equal(keep.index, KeepSet.top(score_N, budget).index)


def test_a_token_that_starts_near_the_text_and_stays_is_not_a_token_that_comes_near():
    signal = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.9, 0.5, 0.2, -0.5]])
    assert UVPrunePruner().select(PruneContext((TokenGrid(1, 1, 4),), 2, {"text_similarity": signal})).index.tolist() == [1, 2]


def test_the_layer_is_a_share_of_the_targets():
    assert [UVPrunePruner().state_layer(layers) for layers in (1, 4, 28, 64)] == [1, 1, 7, 16]
    with pytest.raises(ValueError, match="depth=0"):
        UVPrunePruner(depth=0)
