"""The contract, a comparison with a naive loop, and the method's purpose: no duplicates."""

import math

import pytest
import torch
from specvlm_dart import DARTPruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"video_pivots": 0}, {"text_pivots": 0}, {"states": "raw", "text_pivots": 20}])
def test_contract(fields):
    check_pruner(DARTPruner, **fields)


def signals(total, text, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {
        "key_norm": torch.rand(total, generator=generator),
        "key_norm_text": torch.rand(text, generator=generator),
        "hidden": torch.randn(total, 8, generator=generator),
        "hidden_text": torch.randn(text, 8, generator=generator),
        "final_norm": 4 * torch.rand(8, generator=generator) ** 2,
    }
    return found


def rms_norm(x, weight):
    """The norm that a Qwen2 model applies after its last layer."""
    size = sum(value * value for value in x) / len(x)
    return [w * value / math.sqrt(size + 1e-6) for w, value in zip(weight, x, strict=True)]


def naive(pruner, found, budget):
    """Token by token; states through the final norm itself, as in the released code."""
    norms, text_norms = found["key_norm"].tolist(), found["key_norm_text"].tolist()
    weight = found["final_norm"].tolist()
    states, text_states = found["hidden"].tolist(), found["hidden_text"].tolist()
    if pruner.states == "normed":
        states, text_states = ([rms_norm(x, weight) for x in part] for part in (states, text_states))
    video = sorted(range(len(norms)), key=lambda i: (-norms[i], i))[: min(pruner.video_pivots, budget)]
    text = sorted(range(len(text_norms)), key=lambda i: (-text_norms[i], i))[: pruner.text_pivots]
    kept, rest, count = list(video), budget - len(video), len(video) + len(text)
    for number, pivot in enumerate([states[i] for i in video] + [text_states[i] for i in text]):
        share = rest // count + (1 if number < rest % count else 0)
        left = [i for i in range(len(norms)) if i not in kept]
        left.sort(key=lambda i: (round(cosine(states[i], pivot), 9), i))
        kept += left[:share]
    return sorted(kept)


def exact(x_ND):
    """States with exact cosines: four of eight numbers are 1 or -1, the others 0."""
    return x_ND.sign() * (x_ND.argsort(1).argsort(1) < 4)


def cosine(x, y):
    product, size = sum(a * b for a, b in zip(x, y, strict=True)), math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return product / size if size else 0.0


@pytest.mark.parametrize("states", ["normed", "raw"])
@pytest.mark.parametrize("kind", ["random", "static", "alternating", "one frame", "levels"])
def test_it_equals_a_naive_loop_and_spends_the_budget(kind, states):
    pruner, grid = DARTPruner(states=states), TokenGrid(1 if kind == "one frame" else 5, 2, 3)
    for seed in range(10):
        found = signals(len(grid), 6, seed)
        if kind in ("static", "alternating"):  # frames that are copies of one, or of two in turn: cosines tie
            frames, scenes = grid.frames, 1 if kind == "static" else 2
            found["hidden"] = exact(found["hidden"]).view(frames, 6, 8)[torch.arange(frames) % scenes].flatten(0, 1)
            found |= {"hidden_text": exact(found["hidden_text"]), "final_norm": torch.full((8,), 2.0)}
        if kind == "levels":  # norms tie
            found["key_norm"], found["key_norm_text"] = (found["key_norm"] * 3).round(), (found["key_norm_text"] * 3).round()
        found = {name: signal.double() for name, signal in found.items()}
        for budget in (1, 4, 5, 12, 29)[: 3 if kind == "one frame" else 5]:
            keep = pruner.select(PruneContext((grid,), budget, found))
            assert keep.index.tolist() == naive(pruner, found, budget) and len(keep) == budget


def test_the_final_norm_changes_which_tokens_are_kept():
    found = {"key_norm": torch.tensor([9.0, 0, 0]), "key_norm_text": torch.zeros(1), "hidden_text": torch.ones(1, 2)}
    found |= {"hidden": torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 1.0]]), "final_norm": torch.tensor([0.0, 1.0])}
    ctx = PruneContext((TokenGrid(1, 1, 3),), 2, found)
    assert DARTPruner(1, 0, states="raw").select(ctx).index.tolist() == [0, 2]
    assert DARTPruner(1, 0).select(ctx).index.tolist() == [0, 1]  # all cosines 0: the earlier


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
