"""PruneVid: the result equals plain loops after the paper; static cells, means over segments, attention of clusters."""

from itertools import combinations, pairwise
from math import ceil

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_prunevid import PruneVidPruner, attended, still
from torch.nn.functional import cosine_similarity

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention):
    return PruneContext((grid,), budget, {"features": features, "verifier_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"tau": -2.0, "scenes": 0.0}, {"tau": 2.0, "scenes": 1.0}], ids=str)
def test_contract(fields):
    check_pruner(PruneVidPruner, **fields)


def test_static_cells_are_those_of_high_mean_cosine_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x_FPD = torch.randn(1, 30, 6, generator=generator) + 0.8 * torch.randn(7, 30, 6, generator=generator)
    scenes = [range(4), range(4, 6), range(6, 7)]
    mean_GPD, static_GP = still(x_FPD, torch.tensor([4, 2, 1]), 0.5)
    for scene, frames in enumerate(scenes):
        assert_same_sums(mean_GPD[scene], x_FPD[list(frames)].mean(0), len(frames) + 1, x_FPD)
        pairs = [cosine_similarity(x_FPD[a], x_FPD[b], dim=-1) for a, b in combinations(frames, 2)]
        expected = torch.stack(pairs).mean(0) > 0.5 if pairs else torch.zeros(30, dtype=torch.bool)
        assert torch.equal(static_GP[scene], expected)
    assert static_GP[:2].any() and not static_GP.all()


def test_a_still_scene_becomes_its_mean_and_a_new_scene_begins_where_all_changes():
    generator = torch.Generator().manual_seed(1)
    scenes = torch.randn(2, 1, 6, 16, generator=generator).expand(2, 4, 6, 16)
    x_FPD = (scenes + 0.05 * torch.randn(2, 4, 6, 16, generator=generator)).flatten(0, 1)
    keep = PruneVidPruner().select(context(TokenGrid(8, 2, 3), 12, x_FPD.flatten(0, 1), torch.rand(48, generator=generator)))
    assert keep.index.tolist() == [*range(6), *range(24, 30)]
    expected = torch.cat([x_FPD[:4].mean(0), x_FPD[4:].mean(0)])
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), expected, 5, x_FPD)


def test_clusters_stay_by_the_highest_attention_among_their_tokens():
    owner_N = torch.tensor([0, 0, 2, 2, 4, 5])
    attention_N = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5, 0.4])
    assert attended(owner_N, attention_N, 2).tolist() == [0, 0, -1, -1, 4, -1]


def test_static_and_moving_clusters_are_ranked_together():
    """Of a static cell and two moving tokens the most attended one is kept, here the static one (Eq. 8)."""
    x_FPD = torch.zeros(2, 2, 4)
    x_FPD[:, 0, 0] = x_FPD[0, 1, 1] = x_FPD[1, 1, 2] = 1
    attention = torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    keep = PruneVidPruner().select(context(TokenGrid(2, 1, 2), 1, x_FPD.flatten(0, 1), attention.flatten()))
    assert keep.index.tolist() == [0] and keep.pool.to_dense().tolist() == [[0.5, 0, 0.5, 0]]


@pytest.mark.parametrize(("frames", "lengths"), [("AAABAAAA", [3, 5]), ("ABABABAB", [1, 7]), ("AAAABBBB", [4, 4]), ("A", [1])])
def test_there_are_a_quarter_as_many_segments_as_frames(frames, lengths):
    frame_FD = torch.stack([torch.eye(4)["AB".index(name)] for name in frames])
    _, first_G, length_G = PruneVidPruner().split(frame_FD)
    assert length_G.tolist() == lengths and first_G.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


def brute_force(x_FPD, attention, budget, tau=0.8, gamma=0.25, beta=0.5):
    frames, per_frame, _ = x_FPD.shape
    mean_FD = x_FPD.double().mean(1)
    wanted = max(ceil(gamma * frames), 1)
    label = naive.dpc(mean_FD, list(range(frames)), wanted)[1]
    segments = [[0]]
    for frame in range(1, frames):
        if label[frame] != label[frame - 1]:
            segments.append([])
        segments[-1].append(frame)
    while len(segments) > wanted:  # join the two with the most similar adjoining frames, on a tie the later two
        gap = [float((mean_FD[a[-1]] - mean_FD[b[0]]).square().sum()) for a, b in pairwise(segments)]
        at = max(range(len(gap)), key=lambda i: (-gap[i], i))
        segments[at : at + 2] = [segments[at] + segments[at + 1]]

    sets = []  # (first frame, features by cell, cells, tokens of a cell)
    moving = {}
    for segment in segments:
        static = []
        for cell in range(per_frame):
            pairs = [naive.cosine(x_FPD[a, cell], x_FPD[b, cell]) for a, b in combinations(segment, 2)]
            if pairs and sum(pairs) / len(pairs) > tau:
                static.append(cell)
        mean_PD = x_FPD[segment].double().mean(0)
        sets.append((segment[0], mean_PD, static, [[f * per_frame + cell for f in segment] for cell in range(per_frame)]))
        moving |= {frame: [cell for cell in range(per_frame) if cell not in static] for frame in segment}
    for frame in range(frames):
        sets.append((frame, x_FPD[frame], moving[frame], [[frame * per_frame + cell] for cell in range(per_frame)]))

    counts = [ceil(beta * len(cells)) if len(cells) > 14 else len(cells) for _, _, cells, _ in sets]
    if sum(counts) < budget:
        left = [len(cells) - count for (_, _, cells, _), count in zip(sets, counts, strict=True)]
        more = naive.shares(min(budget - sum(counts), sum(left)), left)
        counts = [count + extra for count, extra in zip(counts, more, strict=True)]
    rows = {}
    for (first, x_PD, cells, tokens), count in zip(sets, counts, strict=True):
        for cell, centre in naive.dpc(x_PD, cells, count)[1].items():
            rows.setdefault(first * per_frame + centre, []).extend(tokens[cell])
    best = sorted(rows, key=lambda token: (-max(float(attention[i]) for i in rows[token]), token))[:budget]
    return naive.mean_pool({token: dict.fromkeys(rows[token], 1.0) for token in best}, frames * per_frame)


@pytest.mark.slow
def test_it_equals_plain_loops_after_the_papers_text():
    for kind, x_FPD, attention, budget in naive.videos():
        keep = PruneVidPruner().select(context(TokenGrid(len(x_FPD), 4, 4), budget, x_FPD.flatten(0, 1), attention))
        index, pool = brute_force(x_FPD, attention, budget)
        assert keep.index.tolist() == index, kind
        assert_same_sums(keep.pool.to_dense(), pool, 1, 1.0)


def test_the_budget_is_met():
    generator = torch.Generator().manual_seed(2)
    grid = TokenGrid(6, 4, 5)
    for budget in range(1, 120, 7):
        x_ND, attention = torch.randn(120, 8, generator=generator), torch.rand(120, generator=generator)
        assert len(PruneVidPruner(tau=2.0).select(context(grid, budget, x_ND, attention))) == budget


def test_a_cell_of_just_tau_is_not_static():
    x_FPD = torch.tensor([[[1.0, 1, 1, 1]], [[1, 1, 1, -1]]])  # of cosine 0.5, exact in float32
    assert [still(x_FPD, torch.tensor([2]), tau)[1].tolist() for tau in (0.5, 0.49)] == [[[False]], [[True]]]


def test_sets_of_more_than_14_are_halved_and_halves_are_rounded_up():
    assert PruneVidPruner().counts(torch.tensor([13, 14, 15, 16, 17]), 1).tolist() == [13, 14, 8, 8, 9]
    assert PruneVidPruner(merge=1e-7).counts(torch.tensor([100]), 1).tolist() == [1]
