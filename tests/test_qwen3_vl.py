"""Qwen3-VL: decodes equal those of Hugging Face's own model, and DeepStack's rows travel with the tokens."""

from __future__ import annotations

from dataclasses import replace

import family_checks as checks
import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine.lean import why_not
from specvlm.errors import UserError
from specvlm.models.load import check_pair, load
from specvlm.models.partition import Stage, check_shares
from specvlm.models.vision_probe import VisionProbe
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import Features, GenerationOptions, KeepSet
from specvlm.video.video import VideoInfo

FAMILY = "qwen3_vl"
TREE = TreeDrafter("chain:3")


def last_logits(lm, request, features) -> torch.Tensor:
    cache = lm.new_cache(len(request))
    return lm.head(lm.prefill(lm.embed(request, features), lm.positions(request), cache, request.cut)[None])[0]


def merge(total: int) -> KeepSet:
    """Merge each pair of neighbours, with unequal weights."""
    source = torch.arange(total)
    return KeepSet.merge(source // 2 * 2, source, 1.0 + source % 2, total)


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_kind_of_request_is_decoded_as_by_a_pristine_model(every):
    assert checks.unequal_requests(FAMILY, every=every) == (10 * (7 if every else 2), [])
    assert min(len(set(answer)) for name, answer in checks.answers(FAMILY).items() if name != "text") > 7


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_model(every):
    tried, wrong = checks.unequal_strategies(FAMILY, every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


@pytest.mark.slow
def test_joined_requests_have_the_answers_of_each_alone():
    names = ("video", "mixed", "two videos")
    graph = checks.graph_of(FAMILY, "draft", UniformPruner(), TREE, ratio=0.5)
    scheduler = Scheduler(graph.engine)
    tickets = [scheduler.submit(graph.work(checks.prompt(FAMILY, name))) for name in names]
    found = [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets]
    assert found == [checks.answers(FAMILY)[name] for name in names]


@pytest.mark.slow
def test_a_target_that_drafts_for_itself_and_sees_all_is_accepted_in_full():
    steps = list(checks.graph_of(FAMILY, "target", UniformPruner(), TREE, ratio=0.0).decode(checks.prompt(FAMILY, "mixed")))
    assert {step.accepted for step in steps[1:] if step.full} == {3}


def test_prompts_equal_those_of_hugging_faces_processor():
    tried, wrong = checks.unlike_the_processor(FAMILY)
    assert (tried, wrong) == (10 + 12 + 4, [])


def test_frames_are_sampled_by_hugging_faces_rule():
    lm = checks.model(FAMILY)
    for total, fps in ((100, 25.0), (37, 29.97), (3, 1.0), (4000, 5.0)):
        found = lm.sampling(VideoInfo(total, fps, 64, 64, total / fps))
        wanted = min(max(int(total / fps * 2), 4), 768, total)
        index = np.linspace(0, total - 1, wanted).round().astype(int)
        assert found["frames"] == wanted and found["sampling"](total, wanted) == index.tolist()


def test_zeroing_deepstacks_rows_moves_the_logits():
    lm, request = checks.model(FAMILY), checks.prompt(FAMILY, "video")
    features = lm.features(request)
    assert isinstance(features, Features) and features.added.shape == (36, 3, 64)
    for level in range(3):
        without = features.added.clone()
        without[:, level] = 0
        moved = last_logits(lm, request, replace(features, added=without)) - last_logits(lm, request, features)
        assert float(moved.abs().max()) > 1e-2, level


@pytest.mark.parametrize("merged", [False, True])
def test_added_rows_travel_with_kept_and_merged_tokens(merged):
    lm, request = checks.model(FAMILY), checks.prompt(FAMILY, "mixed")
    features, total = lm.features(request), len(request.video_index)
    keep = merge(total) if merged else KeepSet(torch.tensor([0, 3, 20, 35]), total)
    weights_KN = torch.eye(total)[keep.index] if keep.pool is None else keep.pool.to_dense()
    found = lm.embed(request, features, keep)
    slots, kept = request.kept_slots(keep.index), request.video_index[keep.index]
    ours = torch.isin(slots, kept)
    assert torch.allclose(found.rows[ours], weights_KN @ features.rows, atol=1e-6)
    assert torch.allclose(found.added[ours], torch.einsum("kn,nld->kld", weights_KN, features.added), atol=1e-6)
    images = torch.isin(slots, request.image_index)
    assert torch.equal(found.added[images], lm.encode_image(request.images[0]).added)
    assert not found.added[~ours & ~images].any() and images.sum() == request.images[0]["tokens"]


def test_a_frame_is_encoded_without_the_others():
    lm, request = checks.model(FAMILY), checks.prompt(FAMILY, "two videos")
    every, keep = lm.features(request), KeepSet(torch.tensor([13, 40]), 44)
    some = lm.features(request, keep)
    assert torch.allclose(some.rows[12:24], every.rows[12:24], atol=1e-5) and not some.rows[:12].any()
    assert torch.allclose(some.added[36 + 4 :], every.added[36 + 4 :], atol=1e-5) and not some.added[24:40].any()


def test_the_pair_is_checked_and_a_draft_may_have_fewer_levels():
    target, small = checks.model(FAMILY), checks.model(FAMILY, "small")
    assert (target.levels, small.levels) == (3, 1) and check_pair(target, small) == 192


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_a_mixture_of_experts_is_decoded_as_by_a_pristine_model_with_dense_drafts(every):
    target, small = checks.model("qwen3_vl_moe"), checks.model("qwen3_vl_moe", "small")
    assert (target.family, small.family) == ("qwen3_vl_moe", "qwen3_vl") and check_pair(target, small) == 192
    assert checks.unlike_the_processor("qwen3_vl_moe") == (10 + 12 + 4, [])
    assert checks.unequal_requests("qwen3_vl_moe", every=every) == (10 * (7 if every else 2), [])
    assert why_not(target) is None, "it runs captured"
    with pytest.raises(UserError, match="a mixture of experts cannot be shared by ranks; use one"):
        check_shares(target.hf.config, 2, "target.parallel=tensor", "use one")


@pytest.mark.slow
@pytest.mark.parametrize("every", checks.EVERY)
def test_every_pruner_and_drafter_gives_the_answer_of_a_pristine_mixture_of_experts(every):
    tried, wrong = checks.unequal_strategies("qwen3_vl_moe", every=every)
    assert tried >= (2 * 26 + 36 if every else 9 + 6) and wrong == []


def test_layers_split_into_stages_add_the_same_rows():
    lm, request = checks.model(FAMILY), checks.prompt(FAMILY, "mixed")
    cpu = torch.device("cpu")
    split = type(lm)(lm.hf, lm.tokenizer, lm.folder, stages=[Stage(cpu, 0, 1), Stage(cpu, 1, 4)])
    features = lm.features(request)
    assert torch.equal(last_logits(split, request, features), last_logits(lm, request, features))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_target_gives_its_own_answer_with_every_kind_of_draft(kind):
    target = load(checks.folder(FAMILY) / "target", "float32", weights=kind)
    prompt = checks.prompt(FAMILY, "mixed")
    alone = tokens_of(list(autoregressive(target, prompt, 24, GreedyVerifier())))
    graph = DecodingGraph(target, checks.model(FAMILY, "small"), UniformPruner(), TREE, GreedyVerifier())
    assert not target.left_full and tokens_of(list(graph.decode(prompt, GenerationOptions(24, 0.5)))) == alone


def test_recorded_attention_is_that_of_the_towers_last_layer():
    """Against a naive softmax, frame by frame. A token is four adjacent patches."""
    lm, prompt = checks.model(FAMILY), checks.prompt(FAMILY, "video")
    attention, entered, sight = lm.hf.model.visual.blocks[-1].attn, [], VisionProbe()

    def note(_, args, kwargs):
        entered.append((args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    lm.features(prompt, sight=sight)
    handle.remove()
    ((hidden_RD, angles),) = entered
    query, key, _ = attention.qkv(hidden_RD).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *angles)
    query_FHRD, key_FHRD = (x.unflatten(0, (3, 48)).transpose(1, 2) for x in (query, key))
    received_FR = (query_FHRD @ key_FHRD.mT * attention.scaling).softmax(-1).mean((1, 2))
    assert torch.allclose(sight.attention(), received_FR.unflatten(1, (12, 4)).mean(2).flatten(), atol=1e-6)
    assert torch.allclose(sight.keys(), key_FHRD.mean(1).unflatten(1, (12, 4)).mean(2).flatten(0, 1), atol=1e-5)
