"""Forward passes (positions, masks, guidance, cache) against Hugging Face and against one token at a time."""

from __future__ import annotations

import random

import pytest
import reference
import tiny
import torch
from rounding import additions, assert_same_sums

from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.base import tree_pass
from specvlm.errors import UserError
from specvlm.models import attention, video_lm, vision_attention
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, KeepSet, TreeShape, ancestor_mask


def filled(lm, request, collector=None, room=80):
    cache = lm.new_cache(len(request) + room)
    hidden = lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut, collector)
    return cache, lm.head(hidden)


def random_tree(rng, nodes, vocabulary=80, chain_tail=3):
    """Make a tree that is bushy at the top, then has one node per level."""
    parents = [-1] + [rng.randrange(max(1, node)) for node in range(1, nodes - chain_tail)]
    parents += list(range(len(parents) - 1, len(parents) - 1 + chain_tail))
    return DraftTree(torch.tensor([rng.randrange(vocabulary) for _ in parents]), tuple(parents))


def path_to(tree, node):
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


def scored(lm, tree, cache):
    return Engine().run([tree_pass(lm, tree, cache)])[0].logits()


def sequential(lm, request, tokens):
    cache, _ = filled(lm, request)
    for token in tokens:
        logits = Engine().append(lm, torch.tensor([token]), cache)
    return logits[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_tree_logits_equal_one_token_at_a_time(family, seed):
    lm, request, rng = tiny.model(family), tiny.prompt(family, seed), random.Random(seed)
    tree = random_tree(rng, 12)
    cache, _ = filled(lm, request)
    logits = scored(lm, tree, cache)
    for node in range(len(tree)):
        expected = sequential(lm, request, tree.tokens[path_to(tree, node)].tolist())
        assert_same_sums(logits[node], expected, additions(lm.hf, cache.length))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_rows_go_on_as_if_they_had_come_one_by_one(family):
    lm, request, rng = tiny.model(family), tiny.prompt(family), random.Random(7)
    tree = random_tree(rng, 14)
    path = path_to(tree, len(tree) - 1)
    cache, _ = filled(lm, request)
    base = cache.length
    scored(lm, tree, cache)
    cache.keep(base, path)
    assert (cache.length, cache.position) == (base + len(path), base + len(path) + cache.offset)
    second = random_tree(rng, 9)
    logits = scored(lm, second, cache)
    tokens = tree.tokens[path].tolist() + second.tokens[path_to(second, 8)].tolist()
    assert_same_sums(logits[8], sequential(lm, request, tokens), additions(lm.hf, cache.length))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_split_prefill_equals_one_forward_of_hugging_face(family):
    for request in (tiny.prompt(family), tiny.prompt(family, videos=2, images=1)):
        lm = tiny.model(family)
        _, logits = filled(lm, request)
        hf = reference.pristine(lm.hf)
        expected = hf(**reference.inputs_of(hf, request)).logits[0, -1]
        assert_same_sums(logits, expected, additions(lm.hf, len(request)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scoring_leaves_the_logits_bit_equal(family, dtype):
    lm, request = tiny.model(family, dtype=dtype), tiny.prompt(family)
    collector = AttentionCollector(request.video_index, rows=True, last_row=True)
    (plain_cache, plain), (cache, watched) = filled(lm, request), filled(lm, request, collector)
    assert torch.equal(plain, watched)
    used = slice(0, cache.length)
    assert torch.equal(plain_cache.keys[..., used, :], cache.keys[..., used, :])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("videos", [1, 2])
def test_guidance_equals_the_mean_of_eager_attention(family, videos):
    lm, request = tiny.model(family), tiny.prompt(family, videos=videos)
    collector = AttentionCollector(request.video_index, rows=True, last_row=True)
    filled(lm, request, collector)
    eager = reference.pristine(lm.hf, "eager")
    inputs = reference.inputs_of(eager, request)
    weights = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0]  # (L, H, S, S)
    weights = weights.float()  # as exact as its softmax
    to_video = weights[:, :, request.cut :, request.video_index]
    terms = additions(lm.hf, len(request))
    assert_same_sums(collector.per_layer(), to_video.mean((1, 2)), terms)
    assert_same_sums(collector.last_rows(), to_video[:, :, -1].mean(1), terms)


def test_guidance_stops_the_pass_at_the_layer_asked_for():
    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    full, early = (AttentionCollector(request.video_index, rows=False, last_row=True, depth=depth) for depth in (None, 2))
    for collector in (full, early):
        lm.prefill(
            lm.embed(request, lm.features(request)), lm.positions(request), lm.new_cache(len(request)), collector=collector
        )
    assert len(full.last_rows()) == 3 and torch.equal(early.last_rows(), full.last_rows()[:2])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_prefill_equals_the_full_one_with_those_keys_masked(family):
    """Prefilling kept rows at their original positions equals a full-length pass with the dropped columns masked."""
    lm, request = tiny.model(family), tiny.prompt(family)
    keep = KeepSet(torch.tensor([1, 2, 9, 17]), len(request.video_index))
    slots = request.kept_slots(keep.index)
    cache = lm.new_cache(len(slots) + 8)
    pruned = lm.prefill(lm.embed(request, lm.features(request, keep), keep), lm.positions(request)[:, slots], cache)
    visible = torch.ones(len(request), len(request), dtype=torch.bool).tril()
    dropped = torch.ones(len(request), dtype=torch.bool)
    dropped[slots] = False
    visible[:, dropped] = False
    visible |= torch.eye(len(request), dtype=torch.bool)
    full = lm.forward(lm.embed(request, lm.features(request)), lm.positions(request), lm.new_cache(len(request)), visible)
    assert_same_sums(pruned, full[-1], additions(lm.hf, len(request)))
    assert cache.position == int(lm.positions(request).max(0).values[-1]) + 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frames_without_a_kept_token_are_not_encoded_and_the_others_do_not_change(family):
    lm, request = tiny.model(family), tiny.prompt(family, videos=2)
    everything = lm.features(request)
    keep = KeepSet(torch.tensor([0, 3, len(request.video_index) - 2]), len(request.video_index))
    some = lm.features(request, keep)
    assert_same_sums(some[keep.index], everything[keep.index], additions(lm.hf, len(request)))
    assert int((some == 0).all(1).sum()) > len(everything) // 2


LARGEST = 6.0  # of what randn gives here: keys, values and the scores of their products


def attention_of(rows, keys, group, width=8, **where):
    torch.manual_seed(rows)
    query = torch.randn(1, 2 * group, rows, width, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, keys, width, dtype=torch.float64)
    seen = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
    wide = [x.repeat_interleave(group, 1) for x in (key, value)]
    scores = (query @ wide[0].mT / width**0.5).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    out, _ = attention.attend(torch.nn.Module(), *(x.to(**where) for x in (query, key, value)), None)
    return out, expected


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (2, 9), (8, 9), (9, 9), (5, 64)])
def test_attention_without_a_mask_is_causal_and_its_rows_are_the_last(rows, keys, group):
    out, expected = attention_of(rows, keys, group)
    assert_same_sums(out, expected, terms=keys + 8, size=LARGEST)  # over the keys, and each score over the width


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("rows", "keys"), [(1, 999), (60, 999), (700, 999), (999, 999)])
def test_flash_attention_behind_a_prefix_is_aligned_at_the_lower_right(rows, keys, width):
    out, expected = attention_of(rows, keys, 5, width, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("chunk", [5, 16, 17])
def test_a_prefill_in_chunks_equals_one_of_one_pass(family, chunk):
    lm, request = tiny.model(family), tiny.prompt(family, videos=2)
    embeds, positions = lm.embed(request, lm.features(request)), lm.positions(request)

    def filled_by(most, cut, **watched):
        cache, collector = lm.new_cache(len(request)), AttentionCollector(request.video_index, **watched)
        hidden = lm.prefill(embeds, positions, cache, cut, collector, most)
        assert cache.length == len(request)
        return hidden, cache, collector

    terms = additions(lm.hf, len(request))
    for cut, watched in ((request.cut, dict(rows=True, last_row=True)), (0, dict(rows=False, last_row=True))):
        (hidden, cache, collector), (expected, whole, watching) = (filled_by(m, cut, **watched) for m in (chunk, 10_000))
        assert_same_sums(hidden, expected, terms)
        assert_same_sums(cache.keys, whole.keys, terms)
        assert_same_sums(collector.last_rows(), watching.last_rows(), terms)
        if collector.rows:
            assert_same_sums(collector.per_layer(), watching.per_layer(), terms)
    _, _, early = filled_by(chunk, 0, rows=False, last_row=True, depth=2)
    assert_same_sums(early.last_rows(), collector.last_rows()[:2], terms)


def test_passes_of_a_prefill_begin_at_fixed_slots_and_are_never_too_long(monkeypatch):
    lm, request, seen = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), []
    layers = VideoLM._layers
    monkeypatch.setattr(VideoLM, "_layers", lambda self, *a: seen.append((len(a[0]), a[3])) or layers(self, *a))
    lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), lm.new_cache(99), request.cut, chunk=16)
    assert {mask for _, mask in seen} == {None}  # nothing as large as rows x keys
    assert [rows for rows, _ in seen] == [16, 16, request.cut - 32, len(request) - request.cut]


@pytest.mark.parametrize("block", [1, 3000, 20_000])
def test_guidance_is_the_same_however_little_of_it_is_held_at_once(block, monkeypatch):
    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    bounded, free = (AttentionCollector(request.video_index, rows=True, last_row=True) for _ in range(2))
    filled(lm, request, free)
    monkeypatch.setattr("specvlm.models.attention_sums.BLOCK", block)
    filled(lm, request, bounded)
    terms = additions(lm.hf, len(request))
    assert_same_sums(bounded.per_layer(), free.per_layer(), terms)
    assert_same_sums(bounded.last_rows(), free.last_rows(), terms)


# Of windows of 4x4 patches, these hold: whole ones alone; some cut at the right; at the bottom; at both; none whole.
GRIDS = [(3, 8, 4), (2, 8, 10), (1, 6, 4), (3, 10, 14), (2, 2, 2)]


@pytest.mark.parametrize("grids", [*([grid] for grid in GRIDS), GRIDS], ids=str)
def test_the_window_attention_of_the_vision_tower_equals_a_call_for_each_window(grids):
    lm = tiny.model("qwen2_5_vl")
    plain = reference.pristine(lm.hf).model.visual
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 96, dtype=torch.float64)
    expected = plain(pixels, grid_thw=torch.tensor(grids)).pooler_output
    ours = lm.hf.model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output  # as a bare `generate` calls it
    terms = additions(plain, len(pixels))
    assert_same_sums(ours, expected, terms)
    if len(grids) == 1:
        assert_same_sums(lm.encode_image({"pixels": pixels, "thw": grids[0]}), expected, terms)


def test_the_vision_tower_calls_attention_once_a_layer_and_length_of_window(monkeypatch):
    calls, real = [], vision_attention.scaled_dot_product_attention
    noting = lambda *a, **n: calls.append(a[0].shape) or real(*a, **n)  # noqa: E731
    monkeypatch.setattr(vision_attention, "scaled_dot_product_attention", noting)
    lm, (grid, video) = tiny.model("qwen2_5_vl"), tiny.video("qwen2_5_vl", frames=3, height=10, width=14)
    lm.encode_video(grid, video, None)
    # Windows of a frame: 6 of 4x4 patches, 5 cut at one side, 1 at both. That they are 3 frames makes no more calls.
    assert sorted(calls[:3]) == [(3, 2, 4, 8), (15, 2, 8, 8), (18, 2, 16, 8)]
    assert calls[3:] == [(3, 2, 140, 8)]  # the second layer is one of full attention


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("patches", [1, 70])
def test_a_video_encoded_in_chunks_is_the_same(family, patches, monkeypatch):
    lm, (grid, video) = tiny.model(family), tiny.video(family, frames=5)
    terms = additions(lm.hf, lm.vision_rows(video))
    for frames in (None, torch.tensor([1, 2]), torch.tensor([0, 3, 4]), torch.tensor([], dtype=torch.int64)):
        monkeypatch.undo()
        expected = lm.encode_video(grid, video, frames)
        assert lm.vision_rows(video) == 5 * lm.frame_patches(video)[1]
        monkeypatch.setattr(video_lm, "PATCHES", patches)
        assert_same_sums(lm.encode_video(grid, video, frames), expected, terms)
        assert lm.vision_rows(video) == max(1, patches // lm.frame_patches(video)[1]) * lm.frame_patches(video)[1]


def test_reference_positions_start_the_text_after_the_largest_axis():
    lm = tiny.wrap(tiny.model("qwen2_5_vl").hf)
    lm.mrope = "reference"
    request = tiny.prompt("qwen2_5_vl", videos=2, images=1)
    positions = lm.positions(request)
    for slot in range(1, len(request)):
        if request.tokens[slot] not in (tiny.VIDEO, tiny.IMAGE):
            assert positions[:, slot].tolist() == [int(positions[:, :slot].max()) + 1] * 3
    time = positions[0, request.video_index][: len(request.grids[0])]
    assert (time - time[0]).unique().tolist() == [0, 2, 4, 6]  # tokens_per_second 2, one second a temporal patch


def test_a_prompt_without_text_after_the_video_is_explained():
    lm = tiny.model("qwen2_5_vl")
    grid, video = tiny.video("qwen2_5_vl")
    with pytest.raises(UserError, match="no text follows the video"):
        lm.expand([1, 2, tiny.VIDEO], [grid], [video])
    with pytest.raises(UserError, match="placeholders"):
        lm.expand([1, tiny.VIDEO, tiny.VIDEO, 2], [grid], [video])


# ---- planted faults: each of the classic ones must be seen ---------------------------------------------------------


def accepted_by_itself(family="qwen2_5_vl"):
    graph = DecodingGraph(tiny.model(family), tiny.model(family), NonePruner(), TreeDrafter(), GreedyVerifier())
    steps = list(graph.decode(tiny.prompt(family), 40))
    return tokens_of(steps), acceptance_of(steps)["accepted_per_round"]


def no_rollback(monkeypatch):
    monkeypatch.setattr(KVCache, "keep", lambda self, base, path: setattr(self, "length", base + len(path)))


def stale_position(monkeypatch):
    append = VideoLM.append_hidden
    monkeypatch.setattr(VideoLM, "append_hidden", lambda self, t, depths, *rest: append(self, t, [0] * len(depths), *rest))


def causal_instead_of_tree_mask(monkeypatch):
    monkeypatch.setattr(DraftTree, "mask", property(lambda self: torch.ones(len(self), len(self), dtype=torch.bool).tril()))


def slot_as_position(monkeypatch):
    monkeypatch.setattr(KVCache, "position", property(lambda self: self.length))
    prefilling = VideoLM.prefilling

    def without_offset(self, embeds, positions, cache, *rest, **named):
        out = yield from prefilling(self, embeds, positions, cache, *rest, **named)
        cache.offset = 0
        return out

    monkeypatch.setattr(VideoLM, "prefilling", without_offset)


@pytest.mark.parametrize("fault", [no_rollback, stale_position, causal_instead_of_tree_mask, slot_as_position])
def test_planted_faults_change_the_output_of_a_target(fault, monkeypatch):
    request = tiny.prompt("qwen2_5_vl")
    expected = tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 40)
    assert accepted_by_itself() == (expected, 5.0)
    fault(monkeypatch)
    tokens, _ = accepted_by_itself()
    assert tokens != expected


def test_the_released_codes_unmasked_one_node_levels_would_be_seen(monkeypatch):
    """C1: without a mask on one-node levels, a drafter equal to the target is no longer accepted in full."""
    append = VideoLM.append_hidden

    def unmasked(self, tokens, depths, seen, cache, root=None):
        if seen is not None and root is not None and len(tokens) == 1:
            seen = torch.ones_like(seen)
        return append(self, tokens, depths, seen, cache, root)

    monkeypatch.setattr(VideoLM, "append_hidden", unmasked)
    expected = tiny.hf_greedy(tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), 40)
    tokens, accepted = accepted_by_itself()
    assert tokens == expected and accepted < 5.0


def test_ancestor_mask_has_no_sibling_and_every_ancestor():
    shape = TreeShape.parse("2x2x1")
    mask = ancestor_mask(shape.parents)
    for row in range(len(shape)):
        assert mask[row].nonzero().flatten().tolist() == path_to(DraftTree(torch.zeros(len(shape)), shape.parents), row)
