"""The references catch bugs that the loops share, and decoding at training positions equals an independent loop."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from rounding import additions, assert_same_sums

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models import attention
from specvlm.models.llava_onevision import LlavaOneVision
from specvlm.models.qwen2_5_vl import Qwen2_5_VL
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions

GREEDY, LIMIT, SHORT = GreedyVerifier(), 20, 12


def decode(target, request, drafter=None, limit=LIMIT, engine=None, **asked):
    draft, drafter = tiny.draft_of(target.family), drafter or TreeDrafter("3x2")
    graph = DecodingGraph(target, draft, TwoStagePruner(), drafter, GREEDY, engine=engine or Engine())
    return tokens_of(list(graph.decode(request, GenerationOptions(limit, 0.5, **asked))))


def alone(target, request, limit=LIMIT):
    return tokens_of(list(autoregressive(target, request, limit, GREEDY)))


@torch.inference_mode()
def logits_of(target, request, tokens):
    """Compute (T, V) logits by the loops' passes, each after the tokens before it."""
    cache = target.new_cache(len(request) + len(tokens))
    hidden_D = target.prefill(target.embed(request, target.features(request)), target.positions(request), cache, request.cut)
    return torch.cat([target.head(hidden_D)[None], Engine().append(target, torch.tensor(tokens[:-1]), cache)])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_reference_shares_no_memory_and_no_attention_with_the_model_under_test(family):
    hf = tiny.model(family).hf
    mine = {tensor.data_ptr() for tensor in (*hf.parameters(), *hf.buffers())}
    for name in ("sdpa", "eager"):
        made = reference.pristine(hf, name)
        assert not mine & {tensor.data_ptr() for tensor in (*made.parameters(), *made.buffers())}
        assert made is not hf and made.config is not hf.config and made.generation_config is not hf.generation_config
        parts = [made.config, made.config.text_config, made.config.vision_config]
        assert {part._attn_implementation for part in parts} == {name}
        assert hf.config.text_config._attn_implementation == attention.NAME


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_both_of_hugging_faces_attentions_and_its_loop_give_the_answer(family, name):
    """Also where a video reaches further in time than the text after it."""
    lm = tiny.model(family)
    for request_of in (dict(videos=2, images=1), dict(frames=12)):
        request = tiny.prompt(family, **request_of)
        assert alone(lm, request) == reference.generated(reference.pristine(lm.hf, name), request, LIMIT)


# ---- slips in what `decode` and `autoregressive` share ----------------------------------------------------------------


def video_rows_one_position_late(monkeypatch):
    positions = Qwen2_5_VL.positions

    def late(self, prompt):
        found = positions(self, prompt).clone()
        found[:, prompt.video_index] += 1
        return found

    monkeypatch.setattr(Qwen2_5_VL, "positions", late)


def time_that_stands_still(monkeypatch):
    grids = Qwen2_5_VL._grids
    still = {"second_per_grid_ts": torch.zeros(9)}
    monkeypatch.setattr(Qwen2_5_VL, "_grids", lambda self, prompt: grids(self, prompt) | still)


def behind_a_prefix(monkeypatch, mask_of):
    """Let rows after a prefix attend by `mask_of(rows, keys)`."""
    attend = attention.scaled_dot_product_attention

    def masked(query, key, value, scaling):
        mask = mask_of(query.shape[2], key.shape[2])
        return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)

    monkeypatch.setattr(attention, "_causal_after_prefix", masked)


def causal_mask_at_the_upper_left(monkeypatch):
    behind_a_prefix(monkeypatch, lambda rows, keys: torch.ones(rows, keys, dtype=torch.bool).tril())


def mask_that_misses_the_slot_before(monkeypatch):
    def mask_of(rows, keys):
        whole = torch.ones(rows, keys, dtype=torch.bool)
        return whole.tril(keys - rows) & ~(whole.tril(keys - rows - 1) & whole.triu(keys - rows - 1))

    behind_a_prefix(monkeypatch, mask_of)


def features_in_another_order(monkeypatch):
    features, encoding = VideoLM.features, VideoLM.encoding

    def flipped(self, *named, **more):
        return (yield from encoding(self, *named, **more)).flip(0)

    monkeypatch.setattr(VideoLM, "features", lambda self, *named, **more: features(self, *named, **more).flip(0))
    monkeypatch.setattr(VideoLM, "encoding", flipped)


def rows_of_an_image_in_another_order(monkeypatch):
    for cls in (Qwen2_5_VL, LlavaOneVision):
        encode = cls.encode_image
        monkeypatch.setattr(cls, "encode_image", lambda self, image, encode=encode: encode(self, image).roll(1, 0))


def heads_that_read_the_keys_of_other_groups(monkeypatch):
    attend = attention.scaled_dot_product_attention

    def swapped(query, key, value, **more):
        if more.get("enable_gqa"):
            key, value = key.flip(1), value.flip(1)
        return attend(query, key, value, **more)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", swapped)


COARSE = [features_in_another_order, causal_mask_at_the_upper_left, heads_that_read_the_keys_of_other_groups]
COARSE_IN_QWEN = [video_rows_one_position_late, time_that_stands_still]
FINE = [mask_that_misses_the_slot_before, rows_of_an_image_in_another_order]  # they may leave an answer as it is
QWEN, LLAVA = tiny.FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "slip"), [*((QWEN, slip) for slip in COARSE + COARSE_IN_QWEN + FINE), *((LLAVA, slip) for slip in COARSE + FINE)]
)
def test_a_slip_that_both_loops_share_is_seen_by_the_reference_alone(family, slip, monkeypatch):
    """Always in the logits, and in the tokens if it is coarse."""
    lm, request = tiny.model(family), tiny.prompt(family, videos=2, images=1)
    tokens, logits_TV = reference.scored(reference.pristine(lm.hf), request, SHORT)
    terms = additions(lm.hf, len(request) + SHORT)
    assert_same_sums(logits_of(lm, request, tokens), logits_TV, terms)
    slip(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same_sums(logits_of(lm, request, tokens), logits_TV, terms)
    wrong = alone(lm, request, SHORT)
    assert decode(lm, request, limit=SHORT) == wrong  # a run would call it identical
    assert slip in FINE or wrong != tokens
    assert reference.generated(reference.pristine(lm.hf), request, SHORT) == tokens


def test_an_answer_through_our_attention_would_not_see_a_slip_in_it(monkeypatch):
    lm, request = tiny.model(LLAVA), tiny.prompt(LLAVA)
    heads_that_read_the_keys_of_other_groups(monkeypatch)
    through_ours = lm.hf.generate(**lm.generate_inputs(request), max_new_tokens=SHORT, do_sample=False, pad_token_id=0)
    through_its_own = reference.generated(reference.pristine(lm.hf), request, SHORT)
    assert through_ours[0, len(request) :].tolist() == alone(lm, request, SHORT) != through_its_own


# ---- mrope=reference --------------------------------------------------------------------------------------------------

PROMPTS = [dict(), dict(frames=12), dict(videos=3, images=2)]
DRAFTERS = [TreeDrafter("3x2"), DynamicTreeDrafter(6, 3, 3), SelfDrafter("2x2"), SparseDrafter(30, 4), PromptLookupDrafter()]


def trained(seed: int = 0) -> VideoLM:
    lm = tiny.wrap(tiny.model("qwen2_5_vl", seed).hf)
    lm.mrope = "reference"
    return lm


def independent(lm, request, limit=LIMIT, penalty=1.0):
    positions = reference.trained_positions(lm.hf, request)
    return reference.decoded(reference.pristine(lm.hf), request, limit, positions, penalty)


def test_the_independent_loop_gives_the_answer_of_generate_at_its_positions():
    """So all of it except the positions is Hugging Face's: loop and penalty."""
    request = tiny.prompt("qwen2_5_vl", videos=2, images=1)
    hf = reference.pristine(tiny.model("qwen2_5_vl").hf)
    named = {name: value for name, value in reference.inputs_of(hf, request).items() if name.endswith(("thw", "ids", "ts"))}
    positions = hf.model.get_rope_index(**named)[0][:, 0]
    for penalty in (1.0, 1.3):
        expected = reference.generated(hf, request, LIMIT, repetition_penalty=penalty)
        assert reference.decoded(hf, request, LIMIT, positions, penalty) == expected


@pytest.mark.parametrize("request_of", PROMPTS, ids=str)
def test_positions_of_training_are_those_counted_token_by_token(request_of):
    lm, request = trained(), tiny.prompt("qwen2_5_vl", **request_of)
    for video, seconds in zip(request.videos, (1.0, 0.7, 2.3), strict=False):
        video["seconds"] = seconds
    assert torch.equal(lm.positions(request), reference.trained_positions(lm.hf, request))


@pytest.mark.slow
@pytest.mark.parametrize("request_of", PROMPTS, ids=str)
def test_decoding_at_the_positions_of_training_is_that_of_an_independent_loop(request_of):
    lm, request = trained(), tiny.prompt("qwen2_5_vl", **request_of)
    expected = independent(lm, request)
    assert alone(lm, request) == expected != tiny.hf_greedy(lm, request, LIMIT)
    for drafter in DRAFTERS:
        assert decode(lm, request, drafter) == expected, drafter
    assert decode(lm, request, positions="reindexed") == decode(lm, request, engine=GraphsEngine("direct")) == expected


@pytest.mark.slow
def test_the_penalty_at_the_positions_of_training_is_that_of_an_independent_loop():
    lm, request = trained(), tiny.prompt("qwen2_5_vl", frames=12)
    lm.repetition_penalty = 1.3
    expected = independent(lm, request, penalty=1.3)
    assert expected != independent(lm, request)
    for engine in (Engine(), GraphsEngine("direct")):
        assert decode(lm, request, engine=engine) == alone(lm, request) == expected


def text_one_position_late(monkeypatch):
    positions = Qwen2_5_VL._reference_positions

    def late(self, prompt):
        found = positions(self, prompt).clone()
        found[:, prompt.cut :] += 1
        return found

    monkeypatch.setattr(Qwen2_5_VL, "_reference_positions", late)


def output_that_goes_on_by_slots(monkeypatch):
    prefilling = VideoLM.prefilling

    def without_offset(self, embeds, positions, cache, *rest, **named):
        out = yield from prefilling(self, embeds, positions, cache, *rest, **named)
        cache.offset = 0
        return out

    monkeypatch.setattr(VideoLM, "prefilling", without_offset)


@pytest.mark.slow
@pytest.mark.parametrize("slip", [text_one_position_late, output_that_goes_on_by_slots])
def test_a_slip_in_the_positions_of_training_is_seen(slip, monkeypatch):
    lm, request = trained(), tiny.prompt("qwen2_5_vl", frames=12)
    expected = independent(lm, request)
    slip(monkeypatch)
    wrong = alone(lm, request)
    assert decode(lm, request) == wrong != expected
