"""Weights in 8 and 4 bits: quantisation error, memory layout, and whole models."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import reference
import tiny
import torch
from torch import nn
from torch.nn.functional import linear

from specvlm import autoregressive, config
from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import UserError
from specvlm.models import load, memory_plan
from specvlm.models.kv_cache import CachePool
from specvlm.models.placement import Placement
from specvlm.models.quantize import BLOCK, KINDS, STORED, QuantizedLinear, quantize, quantize_text, stored
from specvlm.strategies.registry import build
from specvlm.types import GenerationOptions

SIZES = [(256, 40), (96, 5), (3584, 3), (12, BLOCK + 9)]  # (K, N)


def layer_of(K: int, N: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(K + N)
    layer = nn.Linear(K, N, bias).to(dtype).requires_grad_(False)
    layer.weight[0] = 0  # a row no absmax helps with
    layer.weight[1] *= 100
    layer.weight[2] *= 1e-30
    return layer


def scales_of(layer: QuantizedLinear) -> torch.Tensor:
    """Return the (N, K) scale of each weight."""
    return layer.scale.view(layer.out_features, -1).repeat_interleave(layer.group, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_weight_comes_back_within_the_error_of_its_kind(kind, size):
    plain = layer_of(*size)
    layer = quantize(plain, kind)
    scale = scales_of(layer)
    error = (layer.weight_in(torch.float64) - plain.weight.double()).abs()
    bound = torch.maximum(plain.weight.abs() / 16, scale / 1024) if kind == "fp8" else scale / 2
    assert (error <= bound * 1.0001).all()
    assert layer.weight_in(torch.float32)[0].eq(0).all()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_odd_number_of_input_features_is_no_matter_in_8_bits(kind):
    plain = layer_of(33, 7)
    layer = quantize(plain, kind)
    assert layer.weight_in(torch.float32).sub(plain.weight).abs().amax() <= plain.weight.abs().amax() / 16
    with pytest.raises(UserError, match="a layer of 33: use int8 or fp8"):
        quantize(plain, "int4")


def test_a_kind_there_is_none_of_is_refused():
    with pytest.raises(UserError, match="weights=int3 is none of fp8, int8, int4"):
        quantize(layer_of(8, 8), "int3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_pass_is_that_of_the_dequantised_weight(kind, dtype, bias):
    plain = layer_of(96, 20, bias, dtype)
    layer = quantize(plain, kind)
    x = torch.randn(2, 3, 96, dtype=dtype)
    assert torch.equal(layer(x), linear(x, layer.weight_in(dtype), plain.bias))
    if dtype is not torch.float64:
        assert torch.equal(layer.weight_in(dtype), layer.weight_in(torch.float32).to(dtype))  # rounded once
    assert layer(x).dtype == dtype


def test_the_layouts_are_the_ones_the_kernels_read():
    plain = layer_of(512, 20)
    int8, fp8, int4 = (quantize(plain, kind) for kind in ("int8", "fp8", "int4"))
    assert (int8.qweight.shape, int8.scale.shape) == (fp8.qweight.shape, fp8.scale.shape) == ((20, 512), (20,))
    assert int8.qweight.abs().amax() == 127 and fp8.qweight.float().abs().amax() == 448
    assert (int4.qweight.shape, int4.scale.shape) == ((20, 256), (20, 4))
    by_hand = torch.empty(20, 512)
    for j in range(256):
        low, high = int4.qweight[:, j] & 15, int4.qweight[:, j] >> 4
        by_hand[:, j] = (low.float() - 8) * int4.scale[:, j // 128]
        by_hand[:, j + 256] = (high.float() - 8) * int4.scale[:, (j + 256) // 128]
    assert torch.equal(int4.weight_in(torch.float32), by_hand)
    assert {layer.scale.dtype for layer in (int8, fp8, int4)} == {torch.float32}


@pytest.mark.parametrize(("K", "group"), [(256, 128), (3584, 128), (29568, 64), (96, 16), (6, 1)])
def test_int4_groups_divide_both_halves_of_a_row(K, group):
    assert QuantizedLinear(K, 2, "int4", device="meta").group == group
    assert QuantizedLinear(K, 2, "int4", device="meta").scale.shape == (2, K // group)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_leaves_the_stored_weights_alone(kind):
    layer = quantize(layer_of(96, 20), kind)
    before = layer.weight_in(torch.float32)
    model = nn.Sequential(layer)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.to("cpu", dtype)
        assert layer.bias.dtype == dtype and (layer.qweight.dtype, layer.scale.dtype) == (STORED[kind], torch.float32)
        assert torch.equal(layer.weight_in(torch.float32), before)
    assert model.half()[0].qweight.dtype == STORED[kind]
    assert torch.equal(copy.deepcopy(layer).weight_in(torch.float32), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_meta_has_the_sizes_of_one_with_weights(kind):
    here, meta = copy.deepcopy(tiny.model("qwen2_5_vl").hf), copy.deepcopy(tiny.model("qwen2_5_vl").hf).to("meta")
    for hf in (here, meta):
        quantize_text(hf, kind)
    sizes = [{name: (b.shape, b.dtype) for name, b in hf.state_dict().items()} for hf in (here, meta)]
    assert sizes[0] == sizes[1] and all(t.is_meta for t in meta.state_dict().values())
    head = meta.lm_head
    assert head(torch.empty(2, 32, device="meta")).shape == (2, 97)
    filled = head.to_empty(device="cpu")
    assert (filled.qweight.dtype, filled.scale.dtype, filled.qweight.device.type) == (STORED[kind], torch.float32, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_planned_are_the_bytes_held(kind, tied):
    hf = copy.deepcopy(tiny.model("qwen2_5_vl").hf).bfloat16()
    if tied:
        hf.lm_head.weight = hf.model.language_model.embed_tokens.weight
    meta = copy.deepcopy(hf).to("meta")
    before = [sum({w.key: w.nbytes for w in stored(lm, torch.bfloat16, to)}.values()) for lm, to in ((hf, None), (meta, kind))]
    assert before[0] == sum(weight.nbytes for weight in hf.parameters())
    quantize_text(hf, kind)
    ours = sum(b.nbytes for m in hf.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())
    assert before[1] == ours + sum(weight.nbytes for weight in hf.parameters())


def test_the_plan_of_a_quantised_target_is_smaller_and_has_room_to_dequantise_its_head():
    target = load.skeleton(config.model_folder("embedded:qwen2_5_vl/target"))
    cpu = torch.device("cpu")
    needs = [memory_plan.Need(target, 8, torch.float32, kind) for kind in (None, "int8")]
    plain, ours = (memory_plan.plan(need, need, 4, Placement(None, (cpu,), cpu), {})[0][cpu].parts for need in needs)
    assert ours["target weights"] < plain["target weights"] and "draft weights" not in ours
    head = target.hf.lm_head
    prompt = 2 * 8 * head.in_features
    assert (
        ours["activations (estimate)"] == (prompt + head.out_features * head.in_features) * 4 > plain["activations (estimate)"]
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_text_layers_and_the_head_are_quantised_and_nothing_else(family):
    hf = copy.deepcopy(tiny.model(family).hf)
    plain = {name for name, module in hf.named_modules() if isinstance(module, nn.Linear)}
    quantize_text(hf, "int8")
    quantized = {name for name, module in hf.named_modules() if isinstance(module, QuantizedLinear)}
    text = {name for name in plain if name == "lm_head" or ".language_model.layers." in name}
    assert quantized == text and len(quantized) == 3 * 7 + 1
    assert {name for name, module in hf.named_modules() if isinstance(module, nn.Linear)} == plain - text


def test_a_tied_head_is_untied_and_the_embedding_keeps_its_weight():
    hf = copy.deepcopy(tiny.model("qwen2_5_vl").hf)
    embedding = hf.model.language_model.embed_tokens
    hf.lm_head.weight = embedding.weight
    hf.config.tie_word_embeddings = True
    before = embedding.weight.clone()
    quantize_text(hf, "int4")
    hf.tie_weights()  # as Hugging Face may at any time
    assert isinstance(hf.lm_head, QuantizedLinear) and torch.equal(embedding.weight, before)
    assert sorted(dict(hf.lm_head.named_parameters())) == []
    assert tiny.wrap(hf).vocabulary == 97


@pytest.mark.slow
def test_each_old_weight_is_let_go_before_the_next_is_touched(monkeypatch):
    hf = copy.deepcopy(tiny.model("qwen2_5_vl").hf)
    old, alive = [], []

    def watched(layer, *rest):
        gc.collect()
        alive.append(sum(ref() is not None for ref in old))
        old.append(weakref.ref(layer.weight))
        return quantize(layer, *rest)

    monkeypatch.setattr("specvlm.models.quantize.quantize", watched)
    quantize_text(hf, "int8")
    assert len(old) == 22 and set(alive) == {0}


def quantized(lm, kind):
    hf = copy.deepcopy(lm.hf)
    quantize_text(hf, kind)
    return tiny.wrap(hf)


def in_full(hf):
    """Make Hugging Face's own layers with the dequantised weights."""
    full = copy.deepcopy(hf)
    for name, layer in hf.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=hf.dtype)
            plain.weight.data = layer.weight_in(hf.dtype)
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            full.set_submodule(name, plain)
    return reference.pristine(full)


def tokens_of(steps):
    return [token for step in steps for token in step.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_target_is_decoded_without_loss_by_a_quantised_draft(family, kind):
    target, draft = quantized(tiny.model(family), kind), quantized(tiny.draft_of(family), "int4")
    prompt, verifier = tiny.prompt(family), build("verifier", "greedy")
    alone = tokens_of(autoregressive(target, prompt, 24, verifier))
    graph = DecodingGraph(
        target, draft, build("pruner", "uniform"), build("drafter", "tree"), verifier, GenerationOptions(ratio=0.5)
    )
    assert tokens_of(graph.decode(prompt, 24)) == alone == reference.generated(in_full(target.hf), prompt, 24)


def test_self_speculation_drafts_with_the_targets_own_quantised_weights():
    target = quantized(tiny.model("qwen2_5_vl"), "int8")
    prompt, verifier, pool = tiny.prompt("qwen2_5_vl"), build("verifier", "greedy"), CachePool()
    graph = DecodingGraph(target, None, build("pruner", "none"), build("drafter", "self"), verifier, caches=pool)
    steps = list(graph.decode(prompt, 24))
    assert tokens_of(steps) == tokens_of(autoregressive(target, prompt, 24, verifier))
    full = [step.accepted for step in steps[1:] if step.full]
    assert full and min(full) == max(step.depth for step in steps)  # it sees all that the target sees: every guess is right


# Loading, and what the configuration says of it


@pytest.fixture(scope="module")
def plain():
    return load.load(config.model_folder("embedded:qwen2_5_vl/plain"), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_what_the_checkpoint_holds_in_the_dtype_asked_for(kind, plain):
    lm = load.load(config.model_folder("embedded:qwen2_5_vl/plain"), "float32", weights=kind)
    theirs, ours = plain.hf.model.language_model.layers[0].mlp.up_proj, lm.hf.model.language_model.layers[0].mlp.up_proj
    assert torch.equal(ours.weight_in(torch.float32), quantize(theirs, kind).weight_in(torch.float32))
    assert lm.dtype == torch.float32 and lm.vocabulary == plain.vocabulary
    assert not any(p.requires_grad for p in lm.hf.parameters())


def test_bf16_weights_are_those_of_the_dtype_and_it_must_be_bfloat16():
    folder = config.model_folder("embedded:qwen2_5_vl/plain")
    lm = load.load(folder, "auto", weights="bf16")
    assert lm.dtype == torch.bfloat16 and not any(isinstance(m, QuantizedLinear) for m in lm.hf.modules())
    with pytest.raises(UserError, match="weights=bf16, but dtype comes out as float32: give dtype=bfloat16 as well"):
        load.load(folder, "float32", weights="bf16")
    with pytest.raises(UserError, match=r"weights=int9: expected one of null, bf16, fp8, int8, int4\. Did you mean"):
        load.load(folder, "float32", weights="int9")


def test_the_configuration_knows_the_kinds_there_are():
    assert tuple(config.Weights)[1:] == KINDS
