"""FastVID: the result equals plain loops; weights of anchors, places of anchor frames, and an exact budget."""

import naive
import pytest
import torch
from rounding import assert_same_sums
from specvlm_fastvid import FastVidPruner

from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import TokenGrid


def context(grid, budget, features, attention):
    return PruneContext((grid,), budget, {"features": features, "vision_attention": attention})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"d": 1.0, "segments": 1, "beta": 0.0}, {"d": 0.0}, {"gather_anchors": True}], ids=str)
def test_contract(fields):
    check_pruner(FastVidPruner, **fields)


@pytest.mark.parametrize(("start", "stop", "frames"), [(0, 9, [0, 4, 8]), (3, 6, [5]), (2, 7, [2, 6]), (5, 6, [5])])
def test_anchor_frames_are_every_fourth_counted_back_from_the_last(start, stop, frames):
    assert FastVidPruner().anchors(start, stop, 5, 99) == (frames, 5 * (stop - start) // len(frames))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 1.0])
def test_an_anchor_weighs_as_in_the_paper_and_the_rest_is_a_mean(beta):
    generator = torch.Generator().manual_seed(0)
    grid, x_ND = TokenGrid(4, 2, 3), torch.randn(24, 4, generator=generator)
    pruner = FastVidPruner(segments=1, segment=-1.0, d=1.0, beta=beta)
    keep = pruner.select(context(grid, 4, x_ND, torch.rand(24, generator=generator)))
    assert len(keep) == 4 and keep.index.min() >= 18  # all four are anchors, of the last frame
    unit_ND = x_ND / x_ND.norm(dim=1, keepdim=True)
    rest = [i for i in range(24) if i not in keep.index.tolist()]
    nearest = {i: max(keep.index.tolist(), key=lambda a: float(unit_ND[i] @ unit_ND[a])) for i in rest}
    for anchor, row_D in zip(keep.index.tolist(), keep.pool @ x_ND, strict=True):
        mine = [i for i in rest if nearest[i] == anchor]
        w = max(1 / (len(mine) + 1), beta)
        expected = w * x_ND[anchor] + ((1 - w) * x_ND[mine].mean(0) if mine else 0)
        assert_same_sums(row_D, expected if mine else x_ND[anchor], len(mine) + 3, x_ND)


def test_salient_tokens_stay_as_they_are_and_gather_nothing():
    generator = torch.Generator().manual_seed(1)
    grid, x_ND, attention = TokenGrid(4, 3, 4), torch.randn(48, 6, generator=generator), torch.rand(48, generator=generator)
    keep = FastVidPruner().select(context(grid, 20, x_ND, attention))
    salient = attention.view(4, 12).topk(3, dim=1).indices + 12 * torch.arange(4)[:, None]
    rows = torch.searchsorted(keep.index, salient.flatten())
    assert torch.equal(keep.index[rows], salient.flatten())
    assert torch.equal(keep.pool.to_dense()[rows], torch.eye(48)[salient.flatten()])
    others = [row for row in range(48) if row in keep.index and row not in salient]
    assert keep.pool.to_dense()[:, salient.flatten()].sum() == 12 and others


@pytest.mark.slow
def test_the_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(2)
    grid = TokenGrid(9, 3, 4)
    for budget in range(1, len(grid)):
        x_ND, attention = torch.randn(len(grid), 8, generator=generator), torch.rand(len(grid), generator=generator)
        assert len(FastVidPruner().select(context(grid, budget, x_ND, attention))) == budget


def brute_force(x_FPD, saliency, budget, segments, gather_anchors, threshold=0.9, d=0.4, p=4, beta=0.6):
    frames, per_frame, _ = x_FPD.shape
    x_ND = x_FPD.double().flatten(0, 1)
    share = budget // frames
    context_share = int(d * share)
    kept, anchors = set(), {}  # the anchors of each anchor frame
    for frame in range(frames):
        tokens = range(frame * per_frame, (frame + 1) * per_frame)
        kept |= set(sorted(tokens, key=lambda i: (-float(saliency[i]), i))[: share - context_share])
    found = naive.dynamic_segments(x_FPD, threshold, segments)
    for segment in found:
        places = [frame for frame in segment if (segment[-1] - frame) % p == 0]
        for frame in places:
            cells = [c for c in range(per_frame) if frame * per_frame + c not in kept]
            count = min(context_share * len(segment) // len(places), len(cells))
            anchors[frame] = [frame * per_frame + c for c in naive.dpc(x_FPD[frame], cells, count, 4)[0]]
    every = {token for tokens in anchors.values() for token in tokens}
    left = [i for i in range(len(x_ND)) if i not in kept | every]
    kept |= set(sorted(left, key=lambda i: (-float(saliency[i]), i))[: budget - len(kept) - len(every)])
    rows = {token: {token: 1.0} for token in kept}
    for segment in found:
        rest = [f * per_frame + c for f in segment for c in range(per_frame)]
        rest = [i for i in rest if i not in kept and (gather_anchors or i not in every)]
        for tokens in (anchors.get(frame, []) for frame in segment):
            nearest = {i: max(tokens, key=lambda a: (naive.cosine(x_ND[i], x_ND[a]), -a)) for i in rest} if tokens else {}
            for anchor in tokens:
                mine = [i for i in rest if nearest[i] == anchor]
                w = max(1 / (len(mine) + 1), beta) if mine else 1.0
                rows[anchor] = dict.fromkeys(mine, (1 - w) / max(len(mine), 1))
                rows[anchor][anchor] = rows[anchor].get(anchor, 0) + w
    return naive.mean_pool(rows, len(x_ND))


@pytest.mark.slow
@pytest.mark.parametrize("gather_anchors", [False, True])
def test_it_equals_plain_loops_after_the_papers_text(gather_anchors):
    for case, (kind, x_FPD, saliency, budget) in enumerate(naive.videos(frames=7)):
        segments = (8, 1, 3)[case % 3]
        ctx = context(TokenGrid(len(x_FPD), 4, 4), budget, x_FPD.flatten(0, 1), saliency)
        keep = FastVidPruner(segments=segments, gather_anchors=gather_anchors).select(ctx)
        index, pool = brute_force(x_FPD, saliency, budget, segments, gather_anchors)
        assert keep.index.tolist() == index, kind
        assert_same_sums(keep.pool.to_dense(), pool, 112, 1.0)
