"""Tables of joined passes."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from specvlm.engine.batch import bytes_for
from specvlm.engine.contexts import BLOCK, UNIT, Shape, addresses, blocks_for, blocks_of, frame_of, layout_of
from specvlm.engine.steps import REQUESTS, grouped
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Pass
from specvlm.types import DraftTree


def cache_of(capacity: int) -> KVCache:
    return KVCache(2, 1, capacity, 16, torch.float16, torch.device("cpu"))


def test_groups_fit_into_a_pass():
    sizes = [26, 26, 26, 60, 5, 1]
    groups = list(grouped(sizes, lambda rows: rows, 64))
    assert [row for group in groups for row in group] == sizes
    assert [sum(group) for group in groups] == [52, 26, 60, 6]
    assert [len(group) for group in grouped([1] * (REQUESTS + 3), lambda rows: rows, 64)] == [REQUESTS, 3]


def test_a_layout_has_each_rows_request_slot_and_path():
    tree = DraftTree(torch.tensor([5, 6, 7]), (-1, 0, 0))
    seen = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.int8)  # two siblings, two slots before them
    passes = [
        Pass(None, cache_of(300), tree.tokens, tree.depths, tree.mask, 9, 0),
        Pass(None, cache_of(5000), torch.zeros(2, dtype=torch.int64), torch.tensor([2, 2]), seen, 100, -7, at=2),
        Pass(None, cache_of(300), torch.zeros(1, dtype=torch.int64), (4,), None, 50, 0, at=4),
    ]
    shape = Shape.of(passes)
    assert shape == (8, 4, 8, 8192)
    layout = layout_of(shape, passes, frame_of(shape, [3, 2, 1], 5, torch.device("cpu")))
    assert layout.request_Q.tolist() == [0, 0, 0, 1, 1, 2, -1, -1]
    assert layout.local_Q.tolist() == [0, 1, 2, 2, 3, 4, 0, 0]
    assert layout.depth_Q.tolist() == [0, 1, 1, 2, 2, 4, 0, 0]
    assert layout.above_Q.tolist() == [0, 1, 1, 2, 2, 4, 0, 0]
    paths = [way[: above + 1] for way, above in zip(layout.ways_QP.tolist(), layout.above_Q.tolist(), strict=True)]
    assert paths[:6] == [[0], [0, 1], [0, 2], [0, 1, 2], [0, 1, 3], [0, 1, 2, 3, 4]]


def test_blocks_hold_all_query_rows_of_a_request_and_no_others():
    for rows, group in (([6, 1, 26], 5), ([1] * 16, 8), ([64], 7), ([13, 50], 1)):
        count = blocks_for(sum(rows), len(rows), group)
        found, first = blocks_of(rows, group, count).tolist(), 0
        assert len(found) == count
        for request, own in enumerate(rows):
            blocks = [(start, end) for owner, start, end in found if owner == request and end > start]
            covered = [row for start, end in blocks for row in range(start, end)]
            assert covered == list(range(first, first + own * group))
            assert all(end - start <= BLOCK for start, end in blocks)
            first += own * group


def test_addresses_are_counted_from_the_anchor():
    caches, anchor = [cache_of(256), cache_of(512)], torch.zeros(8, dtype=torch.float16)
    found = addresses(caches, anchor, 4)
    assert len(found) == 12 and found[6:] == [0] * 6 and found[2::3][:2] == [256, 512]
    for cache, (keys, values) in zip(caches, (found[0:2], found[3:5]), strict=True):
        assert anchor.data_ptr() + keys * UNIT == cache.keys.data_ptr()
        assert anchor.data_ptr() + values * UNIT == cache.values.data_ptr()


def test_joined_passes_of_a_published_size_take_a_few_hundred_megabytes():
    """Of Qwen2.5-VL 7B at 16,384 slots: 36 segments of attention, 128 rows of 28 heads, and logits of five programs."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=28))
    model = SimpleNamespace(hf=SimpleNamespace(config=config), head_dim=128, kv_heads=4, vocabulary=152_064)
    parts = (16_384 // 512 + 4) * 128 * 28 * (128 + 1) * 4
    assert bytes_for(model, 16_000, torch.bfloat16) == parts + 5 * 128 * 152_064 * 2
    assert bytes_for(model, 16_000, torch.bfloat16) < 300 * 10**6 < bytes_for(model, 100_000, torch.bfloat16)
