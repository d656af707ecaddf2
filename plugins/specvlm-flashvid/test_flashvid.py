"""FlashVID: the result and its picks equal plain loops, a merged chain is a plain mean, the budget is met exactly."""

from math import ceil

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_flashvid import FlashVidPruner, diverse
from torch.nn.functional import normalize

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention=None):
    attention = torch.ones(len(grid)) if attention is None else attention
    return PruneContext((grid,), budget, {"features": features, "vision_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 0.0, "quota": "video", "mean": "token"},
        {"alpha": 1.0, "merge": -1.0, "segments": 1, "relevance": False},
    ],
    ids=str,
)
def test_contract(fields):
    check_pruner(FlashVidPruner, **fields)


@pytest.mark.parametrize("length", [2, 3, 6])
def test_a_merged_chain_is_the_plain_mean_of_its_tokens(length):
    """The published code adds only direct children, and scales a chain of T by T / 2."""
    step = torch.arange(length)[:, None] * torch.tensor([[0.0, 0.0, 0.01]])
    still = torch.tensor([1.0, 0.0, 0.0]).expand(length, 3) + step
    x_FPD = torch.stack([still, torch.tensor([0.0, 1.0, 0.0]) + step], dim=1)
    pruner = FlashVidPruner(alpha=0.0, segments=1)
    keep = pruner.select(context(TokenGrid(length, 1, 2), 2, x_FPD.flatten(0, 1)))
    assert keep.index.tolist() == [0, 1]
    assert_same_sums(keep.pool @ x_FPD.flatten(0, 1), x_FPD.mean(0), length + 1, x_FPD)


def test_a_tree_with_branches_is_the_plain_mean_too():
    root, twig = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    x_ND = torch.stack([root, twig, root + 0.1 * twig, root - 0.1 * twig, root * 2, root * 3])
    keep = FlashVidPruner(alpha=0.0, segment=-1.0, segments=1).select(context(TokenGrid(3, 1, 2), 2, x_ND))
    assert keep.index.tolist() == [0, 1]
    torch.testing.assert_close(keep.pool.to_dense()[0], torch.tensor([0.2, 0, 0.2, 0.2, 0.2, 0.2]))


@pytest.mark.parametrize(("segment", "members"), [(0.9, [0, 1]), (0.8, [0, 1, 2, 3])])
def test_trees_end_at_a_cut(segment, members):
    """Frames 1 and 2 have a cosine of 0.85 and are linked. A budget of 1 leaves no weakest link to cut."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.85, (1 - 0.85**2) ** 0.5]])
    pruner = FlashVidPruner(alpha=0.0, segments=1, segment=segment)
    keep = pruner.select(context(TokenGrid(4, 1, 1), 1, torch.cat([a, a, b, b])))
    assert keep.index.tolist() == [0] and keep.pool.coalesce().indices()[1].tolist() == members


def naive_diverse(unit_PD, saliency_P, picks):
    count = len(unit_PD)
    distance = ((1 - unit_PD @ unit_PD.T) * saliency_P).tolist()
    picked = [max(range(count), key=lambda j: min(distance[i][j] for i in range(count) if i != j))]
    while len(picked) < picks:
        left = [j for j in range(count) if j not in picked]
        picked.append(max(left, key=lambda j: min(distance[i][j] for i in picked)))
    return sorted(picked)


def test_picks_equal_a_naive_greedy_loop():
    generator = torch.Generator().manual_seed(0)
    unit_FPD = normalize(torch.randn(3, 9, 5, generator=generator), dim=-1)
    saliency_FP = torch.rand(3, 9, generator=generator)
    for picks in range(1, 10):
        for frame, picked_P in enumerate(diverse(unit_FPD, saliency_FP, picks)):
            assert picked_P.nonzero().flatten().tolist() == naive_diverse(unit_FPD[frame], saliency_FP[frame], picks)


@pytest.mark.slow
def test_the_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(1)
    grid = TokenGrid(6, 3, 4)
    features, attention = torch.randn(len(grid), 8, generator=generator), torch.rand(len(grid), generator=generator)
    smooth = features.view(6, 12, 8).cumsum(0).flatten(0, 1)
    for budget in range(1, len(grid)):
        for x_ND in (features, smooth, features[:12].repeat(6, 1)):
            for segments in (8, 3):
                assert len(FlashVidPruner(segments=segments).select(context(grid, budget, x_ND, attention))) == budget


def brute_force(x_FPD, saliency, budget, segments, relevance, quota, mean, alpha=0.7, merge=0.8, threshold=0.9):
    frames, per_frame, _ = x_FPD.shape
    total = frames * per_frame
    x_FPD, unit_FPD = x_FPD.double(), normalize(x_FPD.double(), dim=-1)
    found = naive.dynamic_segments(x_FPD, threshold, segments)
    picks = min(ceil(alpha * ceil(per_frame * budget / total)), budget // frames)
    picked, link = {}, {}
    for segment in found:
        event_D = x_FPD[segment].mean((0, 1))
        for frame in segment:
            weight_P = saliency.view(frames, per_frame)[frame].double() * (x_FPD[frame] @ event_D if relevance else 1.0)
            picked[frame] = naive_diverse(unit_FPD[frame], weight_P, picks) if picks else []
            rest = [cell for cell in range(per_frame) if cell not in picked[frame]]
            if frame != segment[0]:
                earlier = [cell for cell in range(per_frame) if cell not in picked[frame - 1]]
                alike = (unit_FPD[frame] @ unit_FPD[frame - 1].T).tolist()
                for cell in rest:
                    cosines = alike[cell]
                    parent = max(earlier, key=lambda other: (cosines[other], -other))
                    if cosines[parent] > merge:
                        link[frame * per_frame + cell] = ((frame - 1) * per_frame + parent, cosines[parent])

    parts = found if quota == "segment" else [list(range(frames))]
    rows = {frame * per_frame + cell: {frame * per_frame + cell: 1.0} for frame in range(frames) for cell in picked[frame]}
    for part, share in zip(parts, naive.shares(budget - picks * frames, [len(part) for part in parts]), strict=True):
        tokens = [f * per_frame + cell for f in part for cell in range(per_frame) if cell not in picked[f]]
        order = sorted((token for token in tokens if token in link), key=lambda token: (-round(link[token][1], 9), token))
        kept = set(order[: len(tokens) - share])
        root, tree = {}, {}
        for token in tokens:
            root[token] = root[link[token][0]] if token in kept else token
            tree.setdefault(root[token], []).append(token)
        roots = [[token % per_frame for token in tree if token // per_frame == frame] for frame in part]
        for frame, cells, count in zip(part, roots, naive.shares(share, [len(cells) for cells in roots]), strict=True):
            mean_PD = torch.zeros_like(x_FPD[0])
            for cell in cells:
                mean_PD[cell] = x_FPD.flatten(0, 1)[tree[frame * per_frame + cell]].mean(0)
            for cell, centre in naive.dpc(mean_PD, cells, count, min(7, count))[1].items():
                mine = tree[frame * per_frame + cell]
                weight = 1 / len(mine) if mean == "tree" else 1.0
                rows.setdefault(frame * per_frame + centre, {}).update(dict.fromkeys(mine, weight))
    return naive.mean_pool(rows, total)


OURS = {"relevance": False, "quota": "video", "mean": "token"}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"relevance": True, "quota": "segment", "mean": "tree"}, OURS], ids=["paper", "ours"])
def test_it_equals_plain_loops_after_the_papers_text(fields):
    for case, (kind, x_FPD, saliency, budget) in enumerate(naive.videos(frames=7)):
        segments = (8, 1, 3)[case % 3]
        ctx = context(TokenGrid(len(x_FPD), 4, 4), budget, x_FPD.flatten(0, 1), saliency)
        keep = FlashVidPruner(segments=segments, **fields).select(ctx)
        index, pool = brute_force(x_FPD, saliency, budget, segments, **fields)
        assert keep.index.tolist() == index, kind
        assert_same_sums(keep.pool.to_dense(), pool, len(x_FPD) + 16, 1.0)


def test_a_token_of_just_the_threshold_is_not_linked():
    unit_FPD = torch.tensor([[[1.0, 1, 1, 1]], [[1, 1, 1, -1]]]) / 2  # of cosine 0.5, exact in float32
    args = (
        unit_FPD,
        torch.zeros(2, 1, dtype=torch.bool),
        torch.tensor([False]),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(1),
    )
    assert [bool(FlashVidPruner(merge=merge).links(*args)[0]) for merge in (0.5, 0.49)] == [False, True]
