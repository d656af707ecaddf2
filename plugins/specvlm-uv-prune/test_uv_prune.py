"""The contract, and that two layers give the same result as all layers between them."""

import math

import pytest
import torch
from rounding import assert_same_sums, rounding
from specvlm_uv_prune import UVPrunePruner
from torch.nn.functional import cosine_similarity

from specvlm.models.vision_probe import HiddenStateProbe, mean_cosine
from specvlm.strategies import PruneContext
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

    states = HiddenStateProbe(video_index, cut, pruner.state_layer(layers))
    states.enter(states_LSD[0])
    for layer in range(1, layers + 1):
        states.observe(layer, states_LSD[layer])
    signal = states.similarity(states_LSD[0, video_index])
    assert_same_sums((signal[1] - signal[0]) * 7, score_N, terms=3 * width + 2 * layers * 7, size=2 * layers * 7)
    for budget in range(1, len(grid)):
        keep = pruner.select(PruneContext((grid,), budget, {"text_similarity": signal}))
        assert torch.equal(keep.index, KeepSet.top(score_N, budget).index)


def naive(states, texts):
    """The sum over layers and text of what each layer adds, token by token."""
    scores = []
    for i in range(len(states[0])):
        steps = [
            cosine(states[layer][i], texts[layer][j]) - cosine(states[layer - 1][i], texts[layer - 1][j])
            for layer in range(1, len(states))
            for j in range(len(texts[0]))
        ]
        scores.append(sum(steps))
    return scores


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


@pytest.mark.parametrize("kind", ["random", "static", "alternating", "one frame"])
def test_kept_tokens_are_the_highest_of_the_papers_sum(kind):
    for seed in range(13):
        grid, layers = TokenGrid(1 if kind == "one frame" else 3 + seed % 2, 2, 2), 1 + seed % 3
        states = torch.randn(layers + 1, len(grid), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        texts = torch.randn(
            layers + 1, 1 + seed % 4, 6, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64
        )
        if kind in ("static", "alternating"):
            scene_F = torch.arange(grid.frames) % (1 if kind == "static" else 2)
            states = states.unflatten(1, (grid.frames, 4))[:, scene_F].flatten(1, 2)
        scores_N = torch.tensor(naive(states.tolist(), texts.tolist()), dtype=torch.float64)
        signal = torch.stack([mean_cosine(states[0], texts[0]), mean_cosine(states[-1], texts[-1])])
        for budget in range(1, len(grid)):
            index = UVPrunePruner().select(PruneContext((grid,), budget, {"text_similarity": signal})).index
            dropped = torch.ones(len(grid), dtype=torch.bool).index_fill(0, index, False)
            slack = rounding(3 * 6 + 2 * layers * 4, 2 * layers * 4)  # copies of a token differ by rounding
            assert len(index) == budget and scores_N[index].min() >= scores_N[dropped].max() - slack


def test_equal_scores_go_to_the_earlier_token():
    signal = torch.tensor([[0.5, 0.0, 0.25, 0.0], [0.75, 0.25, 0.5, 0.5]])
    assert UVPrunePruner().select(PruneContext((TokenGrid(1, 1, 4),), 3, {"text_similarity": signal})).index.tolist() == [
        0,
        1,
        3,
    ]


def test_a_token_that_starts_near_the_text_and_stays_is_not_a_token_that_comes_near():
    signal = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.9, 0.5, 0.2, -0.5]])
    assert UVPrunePruner().select(PruneContext((TokenGrid(1, 1, 4),), 2, {"text_similarity": signal})).index.tolist() == [1, 2]


def test_the_layer_is_a_share_of_the_targets():
    assert [UVPrunePruner().state_layer(layers) for layers in (1, 4, 28, 64)] == [1, 1, 7, 16]
    assert UVPrunePruner(depth=0.29).state_layer(50) == 14 and UVPrunePruner(depth=0.07).state_layer(100) == 7
    with pytest.raises(ValueError, match="depth=0"):
        UVPrunePruner(depth=0)
