"""LVC: the result equals plain loops; weights are the softmax of log attention, pooled frames the weighted sums."""

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_lvc import LvcPruner, weights

from specvlm.errors import UserError
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.1}], ids=str)
def test_contract(fields):
    check_pruner(LvcPruner, **fields)


TERMS = 6 * 4 + 5 * 6  # the frames' attention is a sum of 4, divided and made a softmax; then come the frames


def pooled(temperature, budget=8, frames=6):
    generator = torch.Generator().manual_seed(0)
    x_FPD, attention_FP = torch.randn(frames, 4, 5, generator=generator), torch.rand(frames, 4, generator=generator)
    ctx = PruneContext((TokenGrid(frames, 2, 2),), budget, {"verifier_attention": attention_FP.flatten()})
    keep = LvcPruner(temperature).select(ctx)
    return keep, keep.pool @ x_FPD.flatten(0, 1), x_FPD, attention_FP.sum(1)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_a_pseudo_frame_is_the_sum_of_its_segment_weighted_by_softmax_of_log_attention(temperature):
    keep, x_KD, x_FPD, mass_F = pooled(temperature)
    for number, (start, stop) in enumerate([(0, 3), (3, 6)]):
        w_F = (mass_F[start:stop].log() / temperature).softmax(0)
        expected_PD = (w_F[:, None, None] * x_FPD[start:stop]).sum(0)
        assert_same_sums(x_KD[4 * number : 4 * number + 4], expected_PD, TERMS, x_FPD)
        assert keep.index[4 * number] == 4 * (start + int(mass_F[start:stop].argmax()))


def test_a_large_temperature_is_the_plain_mean_and_a_small_one_the_best_frame():
    _, x_KD, x_FPD, mass_F = pooled(1e9)
    assert_same_sums(x_KD, torch.cat([x_FPD[:3].mean(0), x_FPD[3:].mean(0)]), TERMS, x_FPD)
    _, x_KD, x_FPD, mass_F = pooled(1e-4)
    torch.testing.assert_close(x_KD, torch.cat([x_FPD[mass_F[:3].argmax()], x_FPD[3 + mass_F[3:].argmax()]]))


def test_no_attention_at_all_is_the_plain_mean():
    assert weights(torch.zeros(4), 0.5).tolist() == [0.25] * 4


@pytest.mark.parametrize("budget", range(1, 24))
def test_the_budget_is_met_exactly(budget):
    assert len(pooled(1.0, budget)[0]) == budget


def test_bad_temperature_and_attention_are_refused():
    with pytest.raises(UserError, match="above 0"):
        LvcPruner(0.0)
    with pytest.raises(ValueError, match="attention"):
        LvcPruner().select(PruneContext((TokenGrid(2, 1, 2),), 2, {"verifier_attention": torch.full((4,), float("nan"))}))


def brute_force(attention, frames, per_frame, budget, temperature):
    mass = [sum(attention[f * per_frame : (f + 1) * per_frame].tolist()) for f in range(frames)]
    wanted = -(-budget // per_frame)
    segments = [range(frames * i // wanted, frames * (i + 1) // wanted) for i in range(wanted)]
    least = min(range(wanted), key=lambda i: (sum(mass[f] for f in segments[i]), -i))
    rows = {}
    for number, segment in enumerate(segments):
        heaviest = max(segment, key=lambda f: (mass[f], -f))
        cells = list(range(per_frame))
        if number == least:
            left = budget - (wanted - 1) * per_frame
            cells = [i * (per_frame - 1) // max(left - 1, 1) for i in range(left)]
        for cell in cells:
            weight = {f * per_frame + cell: (mass[f] / mass[heaviest]) ** (1 / temperature) for f in segment}
            rows[heaviest * per_frame + cell] = weight
    return naive.mean_pool(rows, frames * per_frame)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_it_equals_plain_loops_after_the_papers_description(temperature):
    for kind, x_FPD, attention, budget in naive.videos():
        ctx = PruneContext((TokenGrid(len(x_FPD), 4, 4),), budget, {"verifier_attention": attention})
        keep = LvcPruner(temperature).select(ctx)
        index, pool = brute_force(attention, len(x_FPD), 16, budget, temperature)
        assert keep.index.tolist() == index, kind
        assert_same_sums(keep.pool.to_dense(), pool, 16 + 9, 1.0)
