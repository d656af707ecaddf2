"""Fused forms compute what Hugging Face's modules do, are in place while a pass runs, and leave alone what they do not know."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from types import SimpleNamespace

import plain_forms
import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.models import fused
from specvlm.models.attention import AttentionCollector
from specvlm.models.fused import HUGGING_FACE, Forms, Fused, forms_of
from specvlm.models.integrity import structure
from specvlm.models.quantize import quantize_text
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.testing import tiny
from specvlm.types import GenerationOptions

# Modules of a tiny model, of two layers and two blocks, that have a fused form: ends of the names of their classes.
FORMS = {
    "qwen2_5_vl": {
        "RMSNorm": 5 + 5,
        "LMLP": 2,
        "Qwen2MLP": 2,
        "LAttention": 2,
        "VisionAttention": 2,
        "Layer": 2,
        "Block": 2,
        "Embed": 1,
    },
    "llava_onevision": {"RMSNorm": 5, "MLP": 2, "Attention": 2, "Layer": 2},  # nothing of SigLIP's
    "qwen3_vl": {"RMSNorm": 9, "MLP": 2, "TextAttention": 2, "VisionAttention": 2, "Layer": 2, "Embed": 1},
    "qwen3_vl_moe": {"RMSNorm": 9, "TextAttention": 2, "VisionAttention": 2, "Layer": 2, "Embed": 1},
}
OPERATIONS = ("norm", "add_norm", "gate", "turn")


def formed(family: str, ops: object = plain_forms) -> VideoLM:
    lm = tiny.wrapped(copy.deepcopy(tiny.model(family).hf))
    lm.forms = Forms(lm.hf, lm.axes, ops)
    return lm


def counting() -> tuple[SimpleNamespace, Counter[str]]:
    """Make operations that count their calls."""
    calls = Counter[str]()

    def of(name: str):
        def call(*given, **named):
            calls[name] += 1
            return getattr(plain_forms, name)(*given, **named)

        return call

    return SimpleNamespace(**{name: of(name) for name in OPERATIONS}), calls


def in_form(forms: Forms) -> set[nn.Module]:
    return {*forms.forwards}


def left_over(lm: VideoLM) -> list[str]:
    return [name for name, module in lm.hf.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", FORMS)
def test_modules_are_known_by_their_parts(family):
    counts = formed(family).forms.counts
    of_end = {end: sum(n for name, n in counts.items() if name.endswith(end)) for end in FORMS[family]}
    assert of_end == FORMS[family] and sum(counts.values()) == sum(of_end.values())


@pytest.mark.parametrize("family", FORMS)
@torch.inference_mode()
def test_features_and_prefills_are_those_of_the_modules(family):
    (ops, calls), prompt = counting(), tiny.prompt(family, seed=3)
    lm, found = formed(family, ops), []
    for model in (lm, tiny.model(family)):
        calls.clear()
        features = model.features(prompt)
        if model is lm:
            assert calls["turn"] == (0 if family == "llava_onevision" else 2)  # in each of two blocks
            assert calls["gate"] == calls["add_norm"] == (2 if family == "qwen2_5_vl" else 0)
        cache, inputs = model.new_cache(len(prompt)), (model.embed(prompt, features), model.positions(prompt))
        calls.clear()
        state = model.prefill(*inputs, cache, prompt.cut)
        if model is lm:
            assert calls["turn"] == calls["add_norm"] == 2 * 2  # two layers in two passes
        found.append((getattr(features, "rows", features), state, cache.keys, cache.values))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)  # a convolution adds in another order


@pytest.mark.parametrize("family", FORMS)
@torch.inference_mode()
def test_answers_are_the_targets_own(family):
    lm, prompt = formed(family), tiny.prompt(family)
    options, verifier = GenerationOptions(max_new_tokens=12), GreedyVerifier()
    draft = tiny.wrapped(copy.deepcopy(tiny.noisy(family).hf))
    draft.forms = Forms(draft.hf, draft.axes, plain_forms)
    graph = DecodingGraph(lm, draft, TwoStagePruner(), TreeDrafter("3x1x2"), verifier)
    ours = tokens_of(list(graph.decode(prompt, options)))
    assert ours == tokens_of(list(autoregressive(lm, prompt, 12, verifier)))
    assert ours == tokens_of(list(autoregressive(tiny.model(family), prompt, 12, verifier)))
    assert not left_over(lm) and not left_over(draft)


@torch.inference_mode()
def test_nothing_stays_on_modules():
    lm, prompt = formed("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    assert not left_over(lm)
    embeds, positions = lm.embed(prompt, lm.features(prompt)), lm.positions(prompt)
    assert not left_over(lm)
    work = lm.prefilling(embeds, positions, lm.new_cache(len(prompt)), prompt.cut)
    for _ in work:  # other requests run at its pauses
        assert not left_over(lm)
    stopping = AttentionCollector(prompt.video_index, depth=1)  # raises StopForward inside of a layer
    lm.prefill(embeds, positions, lm.new_cache(len(prompt)), prompt.cut, stopping)
    assert not left_over(lm)
    with pytest.raises(KeyError), lm.forms.of(lm.hf.model):
        assert left_over(lm)
        raise KeyError
    assert not left_over(lm)


def test_a_form_that_a_pass_of_another_thread_uses_is_no_change_of_the_model_and_another_forward_is():
    lm = formed("qwen2_5_vl")
    before, layer = structure(lm), lm.text.layers[0]
    with lm.forms.of(layer), lm.forms.of(lm.hf.model):
        assert left_over(lm) and structure(lm) == before
        vars(layer.mlp)["forward"] = torch.nn.functional.relu
        assert [name for name, now in structure(lm).items() if now != before[name]] == [
            "its module model.language_model.layers.0.mlp"
        ]


def test_forms_stay_until_the_last_pass_ends():
    module = nn.Linear(2, 2)
    part = Fused([(module, lambda x: x + 1)])
    with part:
        with part:
            pass
        assert module(1) == 2
    assert "forward" not in vars(module) and module(torch.zeros(2)).shape == (2,)


class OffsetRMSNorm(qwen.Qwen2_5_VLRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states


class DoubledMLP(qwen.Qwen2MLP):
    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * (self.up_proj(x) + 1))


class SwappedAttention(qwen.Qwen2_5_VLAttention):
    def forward(self, hidden_states, position_embeddings=None, **more):
        cos, sin = position_embeddings
        return super().forward(hidden_states, position_embeddings=(sin, cos), **more)


class ScaledVision(qwen.Qwen2_5_VLVisionAttention):
    def forward(self, hidden_states, cu_seqlens, **more):
        return 1.1 * super().forward(hidden_states, cu_seqlens, **more)


class MultipliedLayer(qwen.Qwen2_5_VLDecoderLayer):
    def forward(self, hidden_states, **more):
        return 1.1 * super().forward(hidden_states, **more)


class FaultyLayer(qwen.Qwen2_5_VLDecoderLayer):
    def forward(self, hidden_states, *, another, **more):
        raise NotImplementedError


OTHERS = {
    "language_model.layers.0.input_layernorm": OffsetRMSNorm,
    "language_model.layers.0.mlp": DoubledMLP,
    "language_model.layers.0.self_attn": SwappedAttention,
    "visual.blocks.0.attn": ScaledVision,
    "language_model.layers.0": MultipliedLayer,
    "language_model.layers.1": FaultyLayer,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_that_computes_something_else_stays(name):
    lm = tiny.wrapped(copy.deepcopy(tiny.model("qwen2_5_vl").hf))
    module = lm.hf.model.get_submodule(name)
    module.__class__ = OTHERS[name]
    forms, usual = Forms(lm.hf, lm.axes, plain_forms), formed("qwen2_5_vl").forms
    assert module not in in_form(forms)
    assert sum(forms.counts.values()) == sum(usual.counts.values()) - 1


def test_other_activations_more_parts_and_other_peoples_forwards_stay():
    lm = tiny.wrapped(copy.deepcopy(tiny.model("qwen2_5_vl").hf))
    first, second = lm.text.layers
    first.mlp.act_fn, second.dropout = nn.GELU(), nn.Identity()
    hooked = lm.hf.model.visual.blocks[0].norm1
    vars(hooked)["forward"] = own = hooked.forward
    forms = Forms(lm.hf, lm.axes, plain_forms)
    assert not {first.mlp, second, hooked} & in_form(forms) and first in in_form(forms)
    with forms.of(first), forms.of(lm.hf.model):
        pass
    assert vars(hooked)["forward"] is own


class Unsized(nn.Module):
    """A linear layer that does not tell its size."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("language_model.layers.0.mlp", "gate_proj"),
        ("language_model.layers.0.self_attn", "q_proj"),
        ("visual.blocks.0.attn", "qkv"),
    ],
)
def test_a_module_whose_linear_layers_do_not_tell_their_size_stays(name, part):
    lm = tiny.wrapped(copy.deepcopy(tiny.model("qwen2_5_vl").hf))
    module = lm.hf.model.get_submodule(name)
    setattr(module, part, Unsized(getattr(module, part)))
    found = in_form(Forms(lm.hf, lm.axes, plain_forms))
    assert found and module not in found


def test_a_model_whose_rotary_positions_cannot_be_computed_alone_stays_as_it_is(monkeypatch):
    lm = tiny.wrapped(copy.deepcopy(tiny.model("qwen2_5_vl").hf))

    def split(*_):
        raise RuntimeError("sections that do not sum to the width of a head")

    monkeypatch.setattr(lm.text.rotary_emb, "forward", split)
    assert not Forms(lm.hf, lm.axes, plain_forms).counts


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_quantised_layers_have_forms_too(kind):
    hf = copy.deepcopy(tiny.model("qwen2_5_vl").hf).float()
    quantize_text(hf, kind)
    lm, prompt = tiny.wrapped(hf), tiny.prompt("qwen2_5_vl")
    inputs = lm.embed(prompt, lm.features(prompt)), lm.positions(prompt)
    want = lm.prefill(*inputs, lm.new_cache(len(prompt)))
    lm.forms = Forms(lm.hf, lm.axes, plain_forms)
    assert {*lm.text.layers} < in_form(lm.forms)
    assert torch.equal(lm.prefill(*inputs, lm.new_cache(len(prompt))), want)


@torch.inference_mode()
def test_a_trial_leaves_the_model_and_the_generator_as_they_were():
    hf, state = copy.deepcopy(tiny.model("qwen2_5_vl").hf), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    Forms(hf, 3, plain_forms)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in hf.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_on_a_cpu_hugging_faces_forms_run(dtype):
    assert forms_of(None, 1, dtype, torch.device("cpu")) is HUGGING_FACE


@pytest.mark.parametrize("works", [True, False])
def test_without_kernels_that_run_hugging_faces_forms_do(works, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "pays", lambda dtype, device: True)
    monkeypatch.setitem(sys.modules, "specvlm.models.fused_kernels", plain_forms)
    monkeypatch.setattr("specvlm.models.fused_kernels", plain_forms, raising=False)
    if not works:
        monkeypatch.setattr(plain_forms, "norm", fail)
    hf = copy.deepcopy(tiny.model("qwen2_5_vl").hf)
    forms = forms_of(hf, 3, torch.float64, torch.device("cpu"))
    assert (forms is HUGGING_FACE) is not works and bool(forms.counts) is works
