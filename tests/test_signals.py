"""Each gathered signal equals a naive computation from Hugging Face's own full outputs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import reference
import tiny
import torch
from curious import ALL, Curious, signals_of
from rounding import additions, assert_same_sums
from torch.nn.functional import cosine_similarity, interpolate

from experiments.embedded_pair.evaluate import DRAFTS
from specvlm.config import model_folder
from specvlm.decoding.collect import codec, collector_for, gathered, held_bytes, on_grid
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefill import prefill
from specvlm.decoding.timing import Clock
from specvlm.errors import UserError
from specvlm.models import vision_probe as sight_module
from specvlm.models.load import load
from specvlm.models.partition import Stage
from specvlm.models.vision_probe import VisionProbe, mean_cosine
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, TokenGrid
from specvlm.video.clips import find_clip
from specvlm.video.codec import Stream
from specvlm.video.video import probe, read_video


def in_stages(lm, *ends):
    starts = [0, *ends]
    stages = [Stage(torch.device("cpu"), a, b) for a, b in zip(starts, [*ends, lm.layers], strict=True)]
    return type(lm)(lm.hf, lm.tokenizer, lm.folder, lm.mrope, stages)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_cosines_behind_the_final_norm_are_those_of_states_times_its_weight(family):
    lm, request = tiny.draft_of(family, noise=0.3), tiny.prompt(family)  # whose weights are not 1
    found, _ = signals_of(lm, request)
    weight_D = lm.hf.model.language_model.norm.weight
    assert torch.equal(found["final_norm"], weight_D) and not torch.allclose(weight_D, weight_D.mean(), rtol=0.1)
    normed_ND = lm.hf.model.language_model.norm(found["hidden"]).float()  # it rounds to float32 inside
    scaled_ND = found["hidden"] * found["final_norm"]
    terms = 6 * scaled_ND.shape[1]
    assert_same_sums(cosine_similarity(normed_ND[:1], normed_ND), cosine_similarity(scaled_ND[:1], scaled_ND), terms, 1)
    found["final_norm"].zero_()
    assert weight_D.abs().min() > 0  # a strategy gets its own


@pytest.mark.parametrize("ends", [(), (1,), (1, 2)])
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states_equal_hidden_states_of_hugging_face(family, videos, ends):
    whole, request = tiny.model(family), tiny.prompt(family, videos=videos, images=1)
    lm = in_stages(whole, *ends) if ends else whole
    hf = reference.pristine(whole.hf)
    out = hf(**reference.inputs_of(hf, request), output_hidden_states=True, use_cache=True)
    terms = additions(whole.hf, len(request))
    for layer in (1, 2):
        found, _ = signals_of(lm, request, Curious(layer))
        states_SD = out.hidden_states[layer][0]
        assert_same_sums(found["hidden"], states_SD[request.video_index], terms)
        assert_same_sums(found["hidden_text"], states_SD[request.cut :], terms)
        for row, state_SD in zip(found["text_similarity"], (out.hidden_states[0][0], states_SD), strict=True):
            video_ND, text_TD = state_SD[request.video_index], state_SD[request.cut :]
            naive_NT = cosine_similarity(video_ND[:, None], text_TD[None], dim=-1)
            assert_same_sums(row, naive_NT.mean(1), terms, size=1)
        keys_HSD = out.past_key_values.layers[layer - 1].keys[0]
        norms_S = torch.stack([keys_HSD[:, slot].abs().sum() for slot in range(len(request))])
        assert_same_sums(found["key_norm"], norms_S[request.video_index], terms)
        assert_same_sums(found["key_norm_text"], norms_S[request.cut :], terms)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_states_do_not_depend_on_how_the_prefill_is_cut(family, monkeypatch):
    lm, request = tiny.model(family), tiny.prompt(family)
    whole, _ = signals_of(lm, request)
    lm = copy.copy(lm)
    lm.prefill = lambda *more: type(lm).prefill(lm, *more, chunk=7)
    pieces, _ = signals_of(lm, request)
    for name in ALL:
        assert_same_sums(pieces[name], whole[name], additions(lm.hf, len(request)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weighted_attention_equals_the_weighted_mean_of_eager_attention(family):
    lm, request = tiny.model(family), tiny.prompt(family)
    found, _ = signals_of(lm, request)
    eager = reference.pristine(lm.hf, "eager")
    attentions = eager(**reference.inputs_of(eager, request), output_attentions=True).attentions
    rows_LQN = torch.stack(attentions)[:, 0].mean(1)[:, request.cut :, request.video_index]
    weights_Q = torch.arange(1.0, rows_LQN.shape[1] + 1, dtype=torch.float64)
    naive_LN = (rows_LQN * (weights_Q / weights_Q.sum())[:, None]).sum(1)
    naive_LN = naive_LN.float()  # eager attention has its softmax in float32
    assert_same_sums(found["verifier_attention_weighted"], naive_LN, additions(lm.hf, len(request)))


def naive_vision_attention(lm, grid, video):
    """From the output of eager attention, patch by patch: attention received, and keys."""
    eager = reference.pristine(lm.hf, "eager")
    if lm.family == "llava_onevision":
        out = eager.model.vision_tower(video["pixels"].double(), output_attentions=True, output_hidden_states=True)
        tower = getattr(eager.model.vision_tower, "vision_model", eager.model.vision_tower)
        layer, side = tower.encoder.layers[-1], math.isqrt(out.attentions[-1].shape[-1])
        keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-2])).unflatten(-1, (layer.self_attn.num_heads, -1))
        found = []
        for values in (out.attentions[-1].mean((1, 2))[..., None], keys.mean(2)):
            maps = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            cells = interpolate(maps, size=[grid.height, grid.width], mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
            found.append(torch.cat([cells, cells.new_zeros(1, cells.shape[1])]))
        return found[0][:, 0], found[1]
    t, h, w = video["thw"]
    seen, seen_keys = [], []
    attention = eager.model.visual.blocks[-1].attn
    for frame in video["pixels"].double().unflatten(0, (t, h * w)):
        out = {}
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs, out=out: out.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        eager.model.visual(frame, grid_thw=torch.tensor([[1, h, w]]))
        handle.remove()
        heads = attention.num_heads
        query, key, _ = attention.qkv(out["hidden_states"]).reshape(h * w, 3, heads, -1).permute(1, 0, 2, 3)
        cos, sin = out["position_embeddings"]

        def turn(x, cos=cos, sin=sin):
            half = x.shape[-1] // 2
            return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

        scores = torch.einsum("qhd,khd->hqk", turn(query), turn(key)) * attention.scaling
        received = scores.softmax(-1).mean((0, 1))
        # window order: the place of each merged token, from the windows of 2 x 2 tokens of 16 pixels
        tokens = [(y, x) for y in range(h // 2) for x in range(w // 2)]
        rotated = sorted(tokens, key=lambda p: (p[0] // 2, p[1] // 2, p[0], p[1]))
        for values, found in ((received, seen), (turn(key).mean(1), seen_keys)):
            by_token = dict(zip(rotated, values.unflatten(0, (-1, 4)).mean(1), strict=True))
            found += [by_token[token] for token in tokens]
    return torch.stack(seen), torch.stack(seen_keys)


@pytest.mark.parametrize("block", [None, 600])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_vision_attention_equals_eager_attention_of_the_tower(family, block, monkeypatch):
    if block:
        monkeypatch.setattr(sight_module, "BLOCK", block)
    lm = tiny.model(family)
    grid, video = tiny.video(family, frames=3, height=8, width=12)
    sight = VisionProbe()
    with torch.inference_mode():
        watched = lm.encode_video(grid, video, None, sight)
        assert torch.equal(watched, lm.encode_video(grid, video, None))
        naive, naive_keys = naive_vision_attention(lm, grid, video)
    terms = additions(lm.hf, len(naive))  # eager attention has its softmax in float32
    assert_same_sums(sight.attention(), naive.float(), terms)
    assert_same_sums(sight.keys(), naive_keys.float(), terms)
    assert sight.attention().std() > 0


def test_attention_inside_windows_sums_to_one_in_each():
    lm = tiny.model("qwen2_5_vl")
    grid, video = tiny.video("qwen2_5_vl", frames=2, height=6, width=10)
    hf = copy.deepcopy(lm.hf)
    hf.model.visual.fullatt_block_indexes = []
    sight = VisionProbe()
    with torch.inference_mode():
        tiny.wrap(hf).encode_video(grid, video, None, sight)
    windows = sight.attention().unflatten(0, (2, 3, 5)) * 4  # tokens are means over four patches
    for rows in (slice(0, 2), slice(2, 3)):
        for columns in (slice(0, 2), slice(2, 4), slice(4, 5)):
            assert_same_sums(windows[:, rows, columns].sum((1, 2)), torch.ones(2, dtype=torch.float64), terms=2 * 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gathering_leaves_the_logits_bit_equal(family, dtype):
    lm, request = tiny.model(family, dtype=dtype), tiny.prompt(family)
    with torch.inference_mode():
        _, plain = prefill(lm, request, lm.new_cache(len(request)), Clock(lm.device))
    found, watched = signals_of(lm, request)
    assert torch.equal(plain, watched)
    assert found["hidden"].dtype == dtype and not any(signal.isnan().any() for signal in found.values())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruner_of_every_signal_decodes_the_targets_own_answer(family):
    lm, request = tiny.model(family), tiny.prompt(family)
    graph = DecodingGraph(lm, tiny.draft_of(family), Curious(), TreeDrafter(), GreedyVerifier(), GenerationOptions(ratio=0.5))
    assert tokens_of(list(graph.decode(request, 12))) == tiny.hf_greedy(lm, request, 12)


def test_nothing_is_gathered_unless_named():
    @dataclass(frozen=True)
    class Plain(Curious):
        needs = frozenset({"features"})

    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    assert collector_for(Plain(), lm, request) is None
    with pytest.raises(UserError, match="states after 4 layers, but the target has 3"):
        DecodingGraph(lm, tiny.draft_of("qwen2_5_vl"), Curious(4), TreeDrafter(), GreedyVerifier())


def test_bad_row_weights_are_refused_in_a_sentence():
    @dataclass(frozen=True)
    class Wrong(Curious):
        def row_weights(self, text_TD, features_ND):
            return torch.zeros(len(text_TD))

    with pytest.raises(ValueError, match="not all zero"):
        signals_of(tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), Wrong())


def test_mean_cosine_of_zero_rows_is_zero():
    assert mean_cosine(torch.zeros(3, 4), torch.randn(2, 4)).tolist() == [0, 0, 0]
    assert mean_cosine(torch.randn(3, 4), torch.zeros(2, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_the_bytes_planned_for_signals_are_those_held(family, dtype):
    lm, request, name = tiny.model(family, dtype=dtype), tiny.prompt(family), "verifier_attention_per_kv_head"
    collector = collector_for(Curious(), lm, request, frozenset({name}), hidden=True)
    features, _ = prefill(lm, request, lm.new_cache(len(request)), Clock(lm.device), collector)
    found = gathered(Curious().needs | {name}, request, collector, features)
    heads, states = found[name], [found["hidden"], collector.video_hidden()]
    tensors = [heads, *heads.sort(descending=True, stable=True), *states]
    for held in (*collector._heads.values(), *collector._hidden, *collector.states._video):  # each is there once
        assert held.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in tensors}
    counted = held_bytes(Curious().needs | {name}, True, lm, len(request.video_index), dtype)
    assert counted == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", DRAFTS)
def test_the_prompt_knows_the_file_and_the_frames_of_its_video(family):
    target, path = load(model_folder(f"embedded:{family}/target"), "float32"), find_clip("synthetic_1")
    clip = read_video(path, **target.sampling(probe(path)))
    request = target.prompt("how many objects appear?", [clip])
    origin = request.videos[0]["origin"]
    assert origin.path == str(path) and len(origin.index) == len(clip.frames) == len(clip.times)
    everything = read_video(path)
    assert torch.equal(everything.frames[list(origin.index)], clip.frames)
    signals_3N = codec(request)
    assert signals_3N.shape == (3, len(request.video_index)) and (signals_3N >= 0).all() and signals_3N[0].max() > 0
    by_frame = signals_3N[:, : request.grids[0].cells].unflatten(1, (request.grids[0].frames, -1))
    assert (by_frame[1:] == by_frame[1:, :, :1]).all()  # bytes and kinds are a frame's


def test_frames_that_share_a_token_average_motion_and_add_bytes():
    motion = torch.arange(3.0)[:, None, None].expand(3, 4, 6)
    stream = Stream(motion, torch.tensor([10.0, 20, 40]), torch.tensor([1.0, 0, 0.5]))
    found = on_grid(stream, TokenGrid(2, 2, 3)).unflatten(1, (2, 6))
    assert found[:, :, 0].tolist() == [[0.5, 2.0], [30.0, 40.0], [0.5, 0.5]] and (found == found[..., :1]).all()


def test_a_prompt_without_a_file_has_no_motion():
    request = tiny.prompt("llava_onevision")
    assert torch.equal(codec(request), torch.zeros(3, len(request.video_index)))
