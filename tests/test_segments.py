"""Segments, shares and blocks."""

import pytest
import torch
from rounding import assert_same_sums

from specvlm.toolkit import segments
from specvlm.toolkit.segments import adjacent_cosine, apportion, block_of, cuts, even_spans, spans, spread, written


def test_cuts_are_those_below_the_threshold_and_the_least_similar():
    similar = torch.tensor([0.95, 0.5, 0.97, 0.92, 0.99])
    assert spans(cuts(similar, 0.9)) == [(0, 2), (2, 6)]
    assert spans(cuts(similar, 0.9, least=3)) == [(0, 2), (2, 4), (4, 6)]
    assert spans(cuts(similar, 0.96, least=2)) == [(0, 1), (1, 2), (2, 4), (4, 6)]
    assert spans(cuts(similar, least=99)) == [(f, f + 1) for f in range(6)]


def test_of_equally_similar_pairs_the_earlier_is_cut_and_one_frame_is_one_segment():
    assert spans(cuts(torch.ones(4), least=3)) == [(0, 1), (1, 2), (2, 5)]
    assert spans(cuts(torch.empty(0), least=3)) == [(0, 1)]


def test_adjacent_cosine_takes_frames_or_cells():
    x_FPD = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    cells = adjacent_cosine(x_FPD)
    assert cells.shape == (3, 3)
    assert_same_sums(cells[:, 1], adjacent_cosine(x_FPD[:, 1]), terms=3 * 5, size=1)


@pytest.mark.parametrize("sizes", [[5, 5, 5], [1, 2, 9], [0, 4, 0, 1], [7]])
def test_shares_add_up_follow_sizes_and_never_exceed_them(sizes):
    for total in range(sum(sizes) + 1):
        share = apportion(total, torch.tensor(sizes)).tolist()
        assert sum(share) == total
        assert all(s <= size and abs(s - total * size / sum(sizes)) < 1 for s, size in zip(share, sizes, strict=True))


def test_of_equal_remainders_the_earlier_group_gets_more_and_of_nothing_comes_nothing():
    assert apportion(5, torch.tensor([4, 4, 4])).tolist() == [2, 2, 1]
    assert apportion(0, torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_even_parts_and_spread_places(count):
    for parts in range(1, count + 1):
        runs = even_spans(count, parts)
        lengths = [stop - start for start, stop in runs]
        assert sum(lengths) == count and max(lengths) - min(lengths) <= 1
        places = spread(count, parts).tolist()
        assert len(set(places)) == parts and places == sorted(places) and places[0] >= 0 and places[-1] < count
    assert spread(9, 1).tolist() == [4] and spread(9, 3).tolist() == [1, 4, 7] and spread(9, 0).tolist() == []


def test_blocks_are_named_by_their_middle_cell():
    assert block_of(3, 4, 2).view(3, 4).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [8, 8, 10, 10]]
    assert block_of(3, 3, 3).tolist() == [4] * 9 and block_of(2, 2, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (5, 4), (4, 3, 6)])
def test_cosine_equals_torchs_own_in_any_slices(shape, monkeypatch):
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for elements in (1, 20, 1 << 20):
        monkeypatch.setattr(segments, "ELEMENTS", elements)
        torch.testing.assert_close(segments.cosine(a, b), torch.nn.functional.cosine_similarity(a, b, dim=-1))
    assert segments.cosine(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize(("share", "count", "exact"), [(0.07, 100, 7), (0.29, 100, 29), (0.1, 30, 3), (1, 5, 5)])
def test_a_share_counts_as_it_is_written(share, count, exact):
    assert written(share) * count == exact
