"""Lean pass and captured engine of language models with norms of queries and keys, and with experts."""

from __future__ import annotations

import copy

import family_checks as checks
import packages
import pytest
import torch
from rounding import additions, assert_same_sums

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine, engine_for, ops
from specvlm.engine.base import tree_pass
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.lean import LeanText, Sight, why_not
from specvlm.engine.ops import Experts, Weight
from specvlm.models.quantize import KINDS, QuantizedLinear, left_full, quantize, quantize_text, stored
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.testing import tiny
from specvlm.types import DraftTree, GenerationOptions, TreeShape

FAMILIES = ("qwen3_vl", "qwen3_vl_moe")
TREE = TreeShape.parse("2x2x2").parents


def lean_and_own(lm, request, lean: LeanText):
    """Run a tree by the lean pass and by Hugging Face's modules. Returns logits and caches of both."""
    tree = DraftTree(torch.randint(5, 80, (len(TREE),), generator=torch.Generator().manual_seed(0)).to(lm.device), TREE)
    ours, theirs = (lm.new_cache(len(request) + 40) for _ in range(2))
    embeds = lm.embed(request, lm.features(request))
    for cache in (ours, theirs):
        lm.prefill(embeds, lm.positions(request), cache, request.cut)
    want = Engine().run([tree_pass(lm, tree, theirs)])[0].logits()
    base, offset, depths = (torch.tensor(x, device=lm.device) for x in ([ours.length], [ours.offset], tree.depths))
    sight = Sight(tree.mask.to(lm.device, torch.int8))
    return lean.logits(lean(tree.tokens, depths, 0, sight, base, offset, ours)), want, ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_lean_pass_is_the_models_own(family):
    lm = tiny.noisy(family)  # norms' weights differ from 1
    assert why_not(lm) is None
    found, want, ours, theirs = lean_and_own(lm, tiny.prompt(family), LeanText(lm))
    terms, rows = additions(lm.hf, theirs.length), slice(0, theirs.length)
    assert_same_sums(found, want, terms)
    assert_same_sums(ours.keys[..., rows, :], theirs.keys[..., rows, :], terms)
    assert_same_sums(ours.values[..., rows, :], theirs.values[..., rows, :], terms)


@torch.inference_mode()
def test_a_norm_of_queries_left_out_is_seen():
    lm = tiny.noisy("qwen3_vl")
    lean = LeanText(lm)
    lean.layers[1].norms = ()
    found, want, *_ = lean_and_own(lm, tiny.prompt("qwen3_vl"), lean)
    assert (found - want).abs().max() > 1e-2


@pytest.mark.parametrize("chosen", [1, 2, 3])
@torch.inference_mode()
def test_experts_are_those_of_the_module(chosen):
    layer = tiny.noisy("qwen3_vl_moe").text.layers[0].mlp
    layer.gate.top_k, before = chosen, layer.gate.top_k
    try:
        x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(chosen))
        found, want = ops.experts(x, Experts.of(layer)).sum(0), layer(x[None])[0]
    finally:
        layer.gate.top_k = before
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)  # the router's chances are float32


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_quantised_experts(kind):
    """Their layer is that of the dequantised weights, nothing large is left, and the lean pass reads what is stored."""
    hf = copy.deepcopy(tiny.noisy("qwen3_vl_moe").hf)
    planned = sum({weight.key: weight.nbytes for weight in stored(hf, torch.float64, kind)}.values())
    full = copy.deepcopy(hf).model.language_model.layers[1].mlp
    quantize_text(hf, kind)
    assert left_full(hf, kind) == ""
    buffers = [b for m in hf.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()]
    assert planned == sum(x.nbytes for x in (*buffers, *hf.parameters()))
    layer = hf.model.language_model.layers[1].mlp
    for name in ("gate_up", "down"):
        weight = getattr(full.experts, f"{name}_proj")
        weight.data = getattr(layer.experts, name).weight_in(torch.float64).view_as(weight)
    x = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x[None]), full(x[None]), rtol=1e-9, atol=1e-9)
    lm = tiny.wrapped(hf)
    found, want, *_ = lean_and_own(lm, tiny.prompt("qwen3_vl_moe"), LeanText(lm))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_experts_of_another_kind_run_eager():
    class SharedExperts(torch.nn.Module):
        pass

    assert Experts.of(SharedExperts()) is None
    lm = tiny.wrapped(tiny.built("qwen3_vl_moe", 97))
    lm.text.layers[1].mlp.__class__ = type("OtherMoeBlock", (type(lm.text.layers[1].mlp),), {})
    assert why_not(lm) == "one of its layers is a OtherMoeBlock"


def test_experts_that_would_be_copied_run_eager():
    lm = tiny.wrapped(tiny.built("qwen3_vl_moe", 97))
    layer = lm.text.layers[1].mlp
    shared = {x.data.untyped_storage().data_ptr() for x in layer.parameters()}
    made = Experts.of(layer)
    assert {w.data.untyped_storage().data_ptr() for w in (made.router, made.gate_up, made.down)} == shared
    layer.experts.down_proj.data = layer.experts.down_proj.data.mT.contiguous().mT
    assert why_not(lm) == "the weights of its experts are not contiguous"


def granite(layers):
    """A model whose layers have the names of Llama's, but scale what they add."""
    from transformers import GraniteConfig
    from transformers.models.granite.modeling_granite import GraniteDecoderLayer

    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.2)
    layers[1] = GraniteDecoderLayer(GraniteConfig(**sizes), 1)


def phi(layers):
    """A model with one layer for queries, keys and values."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

    config = Phi3Config(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    layers[1] = Phi3DecoderLayer(config, 1)


def other(path: str):
    """Give a module of a layer a class of its own, whose forward could be another."""

    def change(layers):
        module = layers[1].get_submodule(path)
        module.__class__ = type("Other", (type(module),), {})

    return change


OTHERS = ("input_layernorm", "self_attn", "self_attn.k_norm", "self_attn.o_proj", "mlp", "mlp.gate", "mlp.experts")


@pytest.mark.parametrize(
    ("change", "name"),
    [(granite, "GraniteDecoderLayer"), (phi, "Phi3DecoderLayer"), *((other(path), "Other") for path in OTHERS)],
    ids=["granite", "phi", *OTHERS],
)
def test_layers_that_may_compute_something_else_run_eager(change, name):
    lm = tiny.wrapped(tiny.built("qwen3_vl_moe", 97))
    change(lm.text.layers)
    assert why_not(lm) == f"one of its layers is a {name}"


@pytest.mark.parametrize("verifier", [GreedyVerifier(), CoupledVerifier(0.8, top_p=0.95)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["direct", pytest.param("cudagraph", marks=pytest.mark.gpu)])
def test_captured_is_eager(family, backend, verifier):
    device = "cuda" if backend == "cudagraph" else "cpu"
    dtype = torch.float32 if backend == "cudagraph" else torch.float64
    target, draft = (tiny.wrapped(copy.deepcopy(lm(family).hf).to(device, dtype)) for lm in (tiny.model, tiny.noisy))
    for seed in range(2):
        request, outs = tiny.prompt(family, seed=seed), []
        for engine in (Engine(), GraphsEngine(backend)):
            strategies = TwoStagePruner(), TreeDrafter(), verifier
            graph = DecodingGraph(target, draft, *strategies, GenerationOptions(ratio=0.5), engine=engine)
            outs.append(tokens_of(list(graph.decode(request, 24))))
            assert engine.runs(target) == engine.name
            outs.append(tokens_of(list(autoregressive(target, request, 24, verifier, engine=engine))))
        assert all(out == outs[0] for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "internvl", "qwen2_vl", "smolvlm", "llava_next_video"])
def test_every_kind_of_request_runs_captured_as_it_does_eagerly(family):
    with packages.installed("specvlm-internvl", "specvlm-qwen2-vl", "specvlm-smolvlm2", "specvlm-llava-next-video"):
        models = [checks.model(family, name) for name in ("target", "draft", "small")]
        target, near, small = (type(lm)(copy.deepcopy(lm.hf).cuda(), lm.tokenizer, lm.folder) for lm in models)
        engine, greedy = GraphsEngine(), GreedyVerifier()
        for request in checks.requests(family):
            prompt = checks.prompt(family, request)
            want = tokens_of(list(autoregressive(target, prompt, 24, greedy)))
            assert tokens_of(list(autoregressive(target, prompt, 24, greedy, engine=engine))) == want
            for draft in (near, small):
                strategies = draft, TwoStagePruner(), TreeDrafter(), greedy
                steps = list(DecodingGraph(target, *strategies, GenerationOptions(24, 0.5), engine=engine).decode(prompt))
                assert tokens_of(steps) == want
        assert all(engine.runs(lm) == "graphs" for lm in (target, near, small))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def experts_on_gpu(experts: int, chosen: int, width: int, inner: int, kind: str) -> Experts:
    generator = torch.Generator("cuda").manual_seed(experts)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, device="cuda", generator=generator) * shape[-1] ** -0.5
        return made.to(torch.bfloat16)

    stacks = normal(experts, width), normal(experts * 2 * inner, width), normal(experts * width, inner)
    layers = []
    for stack in stacks:
        layers.append(torch.nn.Linear(*stack.shape[::-1], bias=False, device="meta"))
        layers[-1].weight = torch.nn.Parameter(stack, requires_grad=False)
    router, *inside = layers
    return Experts(Weight.of(router), *(Weight.of(x if kind == "full" else quantize(x, kind)) for x in inside), chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "int8", "int4", "fp8"])
@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768), (8, 2, 256, 160), (60, 4, 512, 192)], ids=str)
@torch.inference_mode()
def test_a_rows_experts_have_the_bits_of_a_pass_of_one(sizes, kind):
    from specvlm.engine import kernels

    layer = experts_on_gpu(*sizes, kind)
    x = torch.randn(64, sizes[2], device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(torch.bfloat16)
    alone = torch.cat([kernels.experts(row[None], layer) for row in x], 1)
    right = ops.experts(x, layer).float().sum(0)
    for count in (2, 6, 16, 17, 26, 64):
        for first in (0, 64 - count):
            found = kernels.experts(x[first : first + count].contiguous(), layer)
            assert torch.equal(found, alone[:, first : first + count])
    off = (found.sum(0) - right).norm(dim=1) / right.norm(dim=1)
    assert off.median() < 1e-2 and (off > 0.05).sum() <= 3  # experts that nearly tie may change places


@pytest.mark.gpu
@torch.inference_mode()
def test_a_row_that_is_no_number_chooses_experts_that_there_are():
    """And leaves the other rows as they are. Their numbers would else lie behind the weights."""
    from specvlm.engine import kernels

    layer = experts_on_gpu(8, 2, 256, 160, "full")
    x = torch.randn(6, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(torch.bfloat16)
    right = kernels.experts(x, layer)
    x[3] = float("nan")
    found, rest = kernels.experts(x, layer), [0, 1, 2, 4, 5]
    assert found[:, 3].isnan().all() and torch.equal(found[:, rest], right[:, rest])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(64, 8, 128), (32, 4, 128), (4, 2, 48)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_rope_with_norms(heads, biased):
    from specvlm.engine import kernels

    many, kv, width = heads
    generator = torch.Generator("cuda").manual_seed(many)
    count, total = 26, (many + 2 * kv) * width
    parts = torch.randn(3, count, total, device="cuda", generator=generator)
    cos, sin = (torch.randn(count, width // 2, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(2))
    norms = tuple(torch.rand(width, device="cuda", generator=generator).to(torch.bfloat16) + 0.5 for _ in range(2))
    sizes = (many * width, kv * width, kv * width)
    biases = tuple(torch.randn(n, device="cuda", generator=generator).to(torch.bfloat16) for n in sizes) if biased else ()
    base, found = torch.tensor([40], device="cuda"), []
    for f in (kernels, ops):
        keys, values = (torch.zeros(kv, 100, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        q = f.rope(parts, biases, cos, sin, keys, values, base, 2, many, norms, 1e-6)
        found.append((q, keys, values))
    for mine, right in zip(*found, strict=True):
        assert (mine.float() - right.float()).norm() / right.float().norm() < 5e-3
    one_keys, one_values = (torch.zeros_like(x) for x in found[0][1:])
    row = slice(7, 8)
    q = kernels.rope(parts[:, row].contiguous(), biases, cos[row], sin[row], one_keys, one_values, base, 9, many, norms, 1e-6)
    assert torch.equal(q, found[0][0][row]) and torch.equal(one_keys[:, 49], found[0][1][:, 49])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_by_kernels_are_the_targets_own(family, dtype):
    """Guesses of a noisy draft, checked 26 rows at a time, and the target alone: the same bits, so the same tokens."""
    torch.manual_seed(0)
    # Heads of 32, which kernels can take; sections of M-RoPE that fit them.
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 4, 4]}
    hf = tiny.built(family, 97, hidden_size=256, intermediate_size=512, num_hidden_layers=3, head_dim=32, rope_parameters=rope)
    draft = copy.deepcopy(hf)
    for weight in draft.parameters():
        weight.data += 0.005 * torch.randn_like(weight)
    target, draft = (tiny.wrapped(each.to("cuda", dtype)) for each in (hf, draft))
    engine = engine_for("graphs", "cuda")
    assert engine.exact(target)
    for seed in range(6):
        request = tiny.prompt(family, seed=seed)
        strategies = TwoStagePruner(), TreeDrafter(), GreedyVerifier()
        graph = DecodingGraph(target, draft, *strategies, GenerationOptions(ratio=0.5), engine=engine)
        steps = list(graph.decode(request, 64))
        plain = list(autoregressive(target, request, 64, GreedyVerifier(), graph.caches, engine))
        assert tokens_of(steps) == tokens_of(plain)
        assert sum(step.accepted for step in steps) > 5
