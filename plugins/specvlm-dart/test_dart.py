"""The contract, a naive loop, and what the method is for: no duplicates."""

import pytest
import torch
from specvlm_dart import DARTPruner
from torch.nn.functional import cosine_similarity

from specvlm.strategy import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"video_pivots": 0}, {"text_pivots": 0}, {"video_pivots": 9, "text_pivots": 20}])
def test_contract(fields):
    check_pruner(DARTPruner, **fields)


def signals(total, text, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    found = {
        "key_norm": torch.rand(total, generator=generator),
        "key_norm_text": torch.rand(text, generator=generator),
        "hidden": torch.randn(total, 8, generator=generator),
        "hidden_text": torch.randn(text, 8, generator=generator),
    }
    if levels:  # many ties
        found = {name: (signal * levels).round() for name, signal in found.items()}
    return found


def naive(pruner, found, budget):
    """Token by token."""
    norms, text_norms = found["key_norm"].tolist(), found["key_norm_text"].tolist()
    video = sorted(range(len(norms)), key=lambda i: (-norms[i], i))[: min(pruner.video_pivots, budget)]
    text = sorted(range(len(text_norms)), key=lambda i: (-text_norms[i], i))[: pruner.text_pivots]
    pivots = [found["hidden"][i] for i in video] + [found["hidden_text"][i] for i in text]
    kept, rest = list(video), budget - len(video)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (1 if number < rest % len(pivots) else 0)
        left = [i for i in range(len(norms)) if i not in kept]
        left.sort(key=lambda i: (round(float(cosine_similarity(found["hidden"][i], pivot, dim=0)), 5), i))
        kept += left[:share]
    return sorted(kept)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 3, 4, 5, 12, 20, 29])
def test_it_equals_a_naive_loop_and_spends_the_budget(seed, budget):
    grid, found = TokenGrid(5, 2, 3), signals(30, 6, seed)
    keep = DARTPruner().select(PruneContext((grid,), budget, found))
    assert keep.index.tolist() == naive(DARTPruner(), found, budget)
    assert len(keep) == budget


def test_tied_norms_and_equal_states_go_to_the_earlier_token():
    found = {name: torch.ones_like(signal) for name, signal in signals(30, 6).items()}
    assert DARTPruner().select(PruneContext((TokenGrid(5, 2, 3),), 7, found)).index.tolist() == list(range(7))


def test_copies_of_a_pivot_go_last():
    found = signals(30, 6)
    found["hidden"][10:20] = found["hidden"][10]
    found["key_norm"][10] = 9.0
    pruner = DARTPruner(video_pivots=1, text_pivots=0)
    keep = pruner.select(PruneContext((TokenGrid(5, 2, 3),), 20, found)).index.tolist()
    assert 10 in keep and len({*range(11, 20)} & {*keep}) <= 1


def test_a_shallow_target_gives_its_last_layer():
    assert [DARTPruner().state_layer(layers) for layers in (1, 2, 28)] == [1, 2, 2]
