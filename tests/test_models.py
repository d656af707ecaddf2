"""Forward passes: positions, masks, guidance and the cache, against Hugging Face and against one token at a time."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from specvlm.cache import KVCache
from specvlm.drafters.tree import TreeDrafter
from specvlm.errors import UserError
from specvlm.graph import DecodingGraph
from specvlm.metrics import acceptance_of, tokens_of
from specvlm.models.attention import Guidance
from specvlm.models.video_lm import VideoLM
from specvlm.pruners.none import NonePruner
from specvlm.types import DraftTree, KeepSet, TreeShape, ancestor_mask
from specvlm.verifiers.greedy import GreedyVerifier


def filled(lm, request, guidance=None, room=80):
    cache = lm.new_cache(len(request) + room)
    hidden = lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut, guidance)
    return cache, lm.head(hidden)


def random_tree(rng, nodes, vocabulary=80, chain_tail=3):
    """Bushy on top, then one node a level."""
    parents = [-1] + [rng.randrange(max(1, node)) for node in range(1, nodes - chain_tail)]
    parents += list(range(len(parents) - 1, len(parents) - 1 + chain_tail))
    return DraftTree(torch.tensor([rng.randrange(vocabulary) for _ in parents]), tuple(parents))


def path_to(tree, node):
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


def sequential(lm, request, tokens):
    cache, _ = filled(lm, request)
    for token in tokens:
        logits = lm.append(torch.tensor([token]), [0], None, cache)
    return logits[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_tree_logits_equal_one_token_at_a_time(family, seed):
    lm, request, rng = tiny.model(family), tiny.prompt(family, seed), random.Random(seed)
    tree = random_tree(rng, 12)
    cache, _ = filled(lm, request)
    logits = lm.score(tree, cache)
    for node in range(len(tree)):
        expected = sequential(lm, request, tree.tokens[path_to(tree, node)].tolist())
        torch.testing.assert_close(logits[node], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_rows_go_on_as_if_they_had_come_one_by_one(family):
    lm, request, rng = tiny.model(family), tiny.prompt(family), random.Random(7)
    tree = random_tree(rng, 14)
    path = path_to(tree, len(tree) - 1)
    cache, _ = filled(lm, request)
    base = cache.length
    lm.score(tree, cache)
    cache.keep(base, path)
    assert (cache.length, cache.position) == (base + len(path), base + len(path) + cache.offset)
    second = random_tree(rng, 9)
    logits = lm.score(second, cache)
    tokens = tree.tokens[path].tolist() + second.tokens[path_to(second, 8)].tolist()
    torch.testing.assert_close(logits[8], sequential(lm, request, tokens), rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_split_prefill_equals_one_forward_of_hugging_face(family):
    for request in (tiny.prompt(family), tiny.prompt(family, videos=2, images=1)):
        lm = tiny.model(family)
        _, logits = filled(lm, request)
        expected = lm.hf(**lm.generate_inputs(request)).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scoring_leaves_the_logits_bit_equal(family, dtype):
    lm, request = tiny.model(family, dtype=dtype), tiny.prompt(family)
    guidance = Guidance(request.video_index, rows=True, last_row=True)
    (plain_cache, plain), (cache, watched) = filled(lm, request), filled(lm, request, guidance)
    assert torch.equal(plain, watched)
    used = slice(0, cache.length)
    assert torch.equal(plain_cache.keys[..., used, :], cache.keys[..., used, :])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("videos", [1, 2])
def test_guidance_equals_the_mean_of_eager_attention(family, videos):
    lm, request = tiny.model(family), tiny.prompt(family, videos=videos)
    guidance = Guidance(request.video_index, rows=True, last_row=True)
    filled(lm, request, guidance)
    eager = tiny.copy.deepcopy(lm.hf)
    eager.set_attn_implementation("eager")
    weights = torch.stack(eager(**lm.generate_inputs(request), output_attentions=True).attentions)[:, 0]  # (L, H, S, S)
    to_video = weights[:, :, request.cut :, request.video_index]
    torch.testing.assert_close(guidance.per_layer(), to_video.mean((1, 2)))
    torch.testing.assert_close(guidance.last_rows(), to_video[:, :, -1].mean(1))


def test_guidance_stops_the_pass_at_the_layer_asked_for():
    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    full, early = (Guidance(request.video_index, rows=False, last_row=True, depth=depth) for depth in (None, 2))
    for guidance in (full, early):
        lm.prefill(
            lm.embed(request, lm.features(request)), lm.positions(request), lm.new_cache(len(request)), guidance=guidance
        )
    assert len(full.last_rows()) == 3 and torch.equal(early.last_rows(), full.last_rows()[:2])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_prefill_equals_the_full_one_with_those_keys_masked(family):
    """Prefill over the kept rows at their original positions = a full-length pass in which dropped columns are hidden."""
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
    torch.testing.assert_close(pruned, full[-1], rtol=0, atol=1e-11)
    assert cache.position == int(lm.positions(request).max(0).values[-1]) + 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frames_without_a_kept_token_are_not_encoded_and_the_others_do_not_change(family):
    lm, request = tiny.model(family), tiny.prompt(family, videos=2)
    everything = lm.features(request)
    keep = KeepSet(torch.tensor([0, 3, len(request.video_index) - 2]), len(request.video_index))
    some = lm.features(request, keep)
    torch.testing.assert_close(some[keep.index], everything[keep.index], rtol=0, atol=1e-12)
    assert int((some == 0).all(1).sum()) > len(everything) // 2


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
    append = VideoLM.append
    monkeypatch.setattr(VideoLM, "append", lambda self, t, depths, *rest: append(self, t, [0] * len(depths), *rest))


def causal_instead_of_tree_mask(monkeypatch):
    monkeypatch.setattr(DraftTree, "mask", property(lambda self: torch.ones(len(self), len(self), dtype=torch.bool).tril()))


def slot_as_position(monkeypatch):
    monkeypatch.setattr(KVCache, "position", property(lambda self: self.length))
    prefill = VideoLM.prefill

    def without_offset(self, embeds, positions, cache, *rest, **named):
        out = prefill(self, embeds, positions, cache, *rest, **named)
        cache.offset = 0
        return out

    monkeypatch.setattr(VideoLM, "prefill", without_offset)


@pytest.mark.parametrize("fault", [no_rollback, stale_position, causal_instead_of_tree_mask, slot_as_position])
def test_planted_faults_change_the_output_of_a_target(fault, monkeypatch):
    request = tiny.prompt("qwen2_5_vl")
    expected = tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 40)
    assert accepted_by_itself() == (expected, 5.0)
    fault(monkeypatch)
    tokens, _ = accepted_by_itself()
    assert tokens != expected


def test_the_released_codes_unmasked_one_node_levels_would_be_seen(monkeypatch):
    """C1: without a mask on one-node levels a drafter that is the target is no longer accepted in full."""
    append = VideoLM.append

    def unmasked(self, tokens, depths, seen, cache, root=None):
        if seen is not None and root is not None and len(tokens) == 1:
            seen = torch.ones_like(seen)
        return append(self, tokens, depths, seen, cache, root)

    monkeypatch.setattr(VideoLM, "append", unmasked)
    expected = tiny.hf_greedy(tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), 40)
    tokens, accepted = accepted_by_itself()
    assert tokens == expected and accepted < 5.0


def test_ancestor_mask_has_no_sibling_and_every_ancestor():
    shape = TreeShape.parse("2x2x1")
    mask = ancestor_mask(shape.parents)
    for row in range(len(shape)):
        assert mask[row].nonzero().flatten().tolist() == path_to(DraftTree(torch.zeros(len(shape)), shape.parents), row)
