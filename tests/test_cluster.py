"""DPC-kNN against a naive loop, and its edge cases."""

import math

import pytest
import torch
from rounding import rounding

from specvlm.toolkit import cluster as module
from specvlm.toolkit.cluster import cluster, density_scores


def naive(x_PD, k):
    """Compute the scores of one group in plain Python."""
    count, width = x_PD.shape
    square = [[float((x_PD[i] - x_PD[j]).square().sum()) / width for j in range(count)] for i in range(count)]
    density = [math.exp(-sum(sorted(row)[:k]) / min(k, count)) for row in square]
    scores = []
    for i in range(count):
        denser = [math.sqrt(square[i][j]) for j in range(count) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * (min(denser) if denser else max(map(math.sqrt, square[i]))))
    return scores, square


@pytest.mark.parametrize("k", [1, 4, 7, 99])
@pytest.mark.parametrize("capped", [False, True])
def test_scores_and_clusters_equal_a_naive_loop(k, capped):
    x_GPD = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    mask_GP = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    count_G = torch.tensor([1, 3, 5])
    scores_GP = density_scores(x_GPD, k, mask_GP)
    centre_GP, owner_GP = cluster(x_GPD, count_G, k, mask_GP, capped)
    for g in range(3):
        members = mask_GP[g].nonzero().flatten().tolist()
        scores, square = naive(x_GPD[g, members].double(), k)
        # A squared distance is the difference of squared norms, of which little is left for near tokens.
        near = min(square[i][j] for i in range(len(members)) for j in range(i)) * 5
        size = 4 * float(x_GPD[g].square().sum(1).max()) / near
        rtol = rounding(terms=2 * 5 + min(k, 12), size=size, dtype=torch.float32)
        torch.testing.assert_close(scores_GP[g, members].exp(), torch.tensor(scores), rtol=rtol, atol=0)
        if capped:
            scores, _ = naive(x_GPD[g, members].double(), min(k, int(count_G[g])))
        chosen = sorted(range(len(members)), key=lambda i: -scores[i])[: count_G[g]]
        assert sorted(members[i] for i in chosen) == centre_GP[g].nonzero().flatten().tolist()
        for i, member in enumerate(members):
            nearest = min(sorted(chosen), key=lambda c: square[i][c])
            assert owner_GP[g, member] == members[nearest]
        assert (owner_GP[g][~mask_GP[g]] == -1).all() and (scores_GP[g][~mask_GP[g]] == -math.inf).all()


def test_of_equal_tokens_the_earlier_lead():
    centre_GP, owner_GP = cluster(torch.ones(2, 5, 3), torch.tensor([2, 0]))
    assert centre_GP[0].tolist() == [True, True, False, False, False] and owner_GP[0].tolist() == [0, 1, 0, 0, 0]
    assert owner_GP[1].tolist() == [-1] * 5


def test_wide_features_keep_their_order_where_densities_would_be_zero():
    x_GPD = 1e3 * torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    scores = density_scores(x_GPD)[0]
    assert scores.isfinite().all() and len(scores.unique()) == 9


def test_an_empty_group_and_groups_done_in_parts():
    x_GPD = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    mask_GP = torch.ones(5, 6, dtype=torch.bool)
    mask_GP[2] = False
    whole = cluster(x_GPD, torch.full((5,), 2), mask_GP=mask_GP)
    assert not whole[0][2].any() and (whole[1][2] == -1).all()
    entries, module.ENTRIES = module.ENTRIES, 40
    try:
        parts = cluster(x_GPD, torch.full((5,), 2), mask_GP=mask_GP)
    finally:
        module.ENTRIES = entries
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
