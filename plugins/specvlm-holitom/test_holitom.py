"""HoliTom: the result and the partition equal brute force, static cells become means over time."""

from itertools import combinations, pairwise

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_holitom import HoliTomPruner, partition

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention):
    return PruneContext((grid,), budget, {"features": features, "vision_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"tau": -2.0, "own": 0.0}, {"tau": 2.0}], ids=str)
def test_contract(fields):
    check_pruner(HoliTomPruner, **fields)


def gain(still_EP, windows):
    return sum(int(still_EP[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in windows)


def test_the_partition_gains_as_much_as_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        frames = 1 + case % 8
        still_EP = torch.rand(frames - 1, 6, generator=generator) < 0.75
        windows = partition(still_EP)
        assert [a for a, _ in windows][1:] == [b for _, b in windows][:-1] and windows[0][0] == 0 and windows[-1][1] == frames
        every = [pairwise([0, *cut, frames]) for n in range(frames) for cut in combinations(range(1, frames), n)]
        assert gain(still_EP, windows) == max(gain(still_EP, list(w)) for w in every)


def scene():
    """Six frames of four cells: cells 0 and 1 are static but for a change at frame 3; cells 2 and 3 are noise."""
    generator = torch.Generator().manual_seed(3)
    x_FPD = torch.randn(6, 4, 16, generator=generator)
    for start in (0, 3):
        x_FPD[start : start + 3, :2] = torch.randn(1, 2, 16, generator=generator) + 0.1 * torch.randn(
            3, 2, 16, generator=generator
        )
    return x_FPD


def test_still_cells_become_means_over_their_window_at_its_first_frame():
    x_FPD, attention = scene(), torch.rand(24, generator=torch.Generator().manual_seed(4))
    keep = HoliTomPruner().select(context(TokenGrid(6, 2, 2), 16, x_FPD.flatten(0, 1), attention))
    assert {0, 1, 12, 13} <= set(keep.index.tolist()) and len(keep) == 16  # 12 moving tokens and 4 means, all kept
    rows = torch.searchsorted(keep.index, torch.tensor([0, 1, 12, 13]))
    expected = torch.cat([x_FPD[:3, :2].mean(0), x_FPD[3:, :2].mean(0)])
    assert_same_sums((keep.pool @ x_FPD.flatten(0, 1))[rows], expected, 4, x_FPD)


def test_moving_cells_stay_by_saliency_in_every_frame_alike():
    x_FPD, attention = scene(), torch.rand(24, generator=torch.Generator().manual_seed(4))
    keep = HoliTomPruner().select(context(TokenGrid(6, 2, 2), 8, x_FPD.flatten(0, 1), attention))
    moving = [i for i in keep.index.tolist() if i % 4 > 1]
    assert moving == [4 * f + 2 + int(attention[4 * f + 3] > attention[4 * f + 2]) for f in range(6)]


def test_a_still_centre_is_own_parts_itself_and_the_rest_the_others_of_its_cluster():
    x_FPD = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    keep = HoliTomPruner(own=0.6).select(context(TokenGrid(2, 1, 5), 1, x_FPD.flatten(0, 1), torch.rand(10)))
    others = [i for i in range(5) if i != keep.index[0]]
    expected = 0.6 * x_FPD[0, keep.index[0]] + 0.4 * x_FPD[0, others].mean(0)
    assert_same_sums((keep.pool @ x_FPD.flatten(0, 1))[0], expected, 5 + 3, x_FPD)


def test_the_mean_of_a_cluster_leaves_its_centre_out():
    """Token 1 joins token 0: 0.6 of 0 and 0.4 of 0.2 are 0.08, where a mean with the centre in it gives 0.04."""
    cells_PD = torch.tensor([[0, 1, 0, 0], [0, 1, 0.2, 0], [0, 1, -0.25, 0], [0, 1, 0, 0.3]])
    keep = HoliTomPruner().select(context(TokenGrid(2, 2, 2), 3, cells_PD.repeat(2, 1), torch.ones(8)))
    assert keep.index.tolist() == [0, 2, 3]
    torch.testing.assert_close((keep.pool @ cells_PD.repeat(2, 1))[0], torch.tensor([0, 1, 0.08, 0]))


def brute_force(x_FPD, attention, budget, tau=0.8, own=0.6):
    frames, per_frame, _ = x_FPD.shape

    def still(start, stop):
        pairs = [(f, f + 1) for f in range(start, stop - 1)]
        return [c for c in range(per_frame) if all(naive.cosine(x_FPD[a, c], x_FPD[b, c]) > tau for a, b in pairs)]

    found = {(a, b): still(a, b) if b - a > 1 else [] for a in range(frames) for b in range(a + 1, frames + 1)}
    every = [list(pairwise([0, *cut, frames])) for n in range(frames) for cut in combinations(range(1, frames), n)]
    gains = [sum(len(found[window]) * (window[1] - window[0] - 1) for window in windows) for windows in every]
    best = [windows for windows, gain in zip(every, gains, strict=True) if gain == max(gains)]
    windows = max(best, key=lambda windows: [start for start, _ in reversed(windows)])

    moving = {f: [c for c in range(per_frame) if c not in found[a, b]] for a, b in windows for f in range(a, b)}
    share = naive.shares(budget, [len(moving[f]) for f in range(frames)] + [len(found[window]) for window in windows])
    rows = {}
    for frame in range(frames):
        order = sorted(moving[frame], key=lambda c: (-float(attention[frame * per_frame + c]), c))
        rows |= {frame * per_frame + c: {frame * per_frame + c: 1.0} for c in order[: share[frame]]}
    for (start, stop), count in zip(windows, share[frames:], strict=True):
        centres, centre_of = naive.dpc(x_FPD[start:stop].double().mean(0), found[start, stop], count, min(7, count))
        for centre in centres:
            others = [cell for cell, mine in centre_of.items() if mine == centre and cell != centre]
            weight = {centre: own if others else 1.0} | {cell: (1 - own) / len(others) for cell in others}
            rows[start * per_frame + centre] = {
                f * per_frame + cell: part for cell, part in weight.items() for f in range(start, stop)
            }
    return naive.mean_pool(rows, frames * per_frame)


@pytest.mark.slow
def test_it_equals_plain_loops_after_the_released_code():
    for kind, x_FPD, attention, budget in naive.videos(frames=7):
        keep = HoliTomPruner().select(context(TokenGrid(len(x_FPD), 4, 4), budget, x_FPD.flatten(0, 1), attention))
        index, pool = brute_force(x_FPD, attention, budget)
        assert keep.index.tolist() == index, kind
        assert_same_sums(keep.pool.to_dense(), pool, 4, 1.0)


def test_the_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(1)
    for budget in range(1, 16):
        keep = HoliTomPruner().select(
            context(TokenGrid(6, 2, 2), budget, scene().flatten(0, 1), torch.rand(24, generator=generator))
        )
        assert len(keep) == budget


def test_a_cell_of_just_tau_moves():
    """Cosines 0.5, exact in float32, and 1: the moving cell is kept twice, the static one once."""
    x_FPD = torch.tensor([[[1.0, 1, 1, 1]] * 2, [[1, 1, 1, -1], [1, 1, 1, 1]]])
    signals = {"features": x_FPD.flatten(0, 1), "vision_attention": torch.ones(4)}
    for tau, index in ((0.5, [0, 1, 2]), (0.49, [0, 1])):
        assert HoliTomPruner(tau=tau).select(PruneContext((TokenGrid(2, 1, 2),), 3, signals)).index.tolist() == index
