"""Kernels against the plain operations, and the captured engine against the eager one, on a GPU."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from torch import nn

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import ops
from specvlm.engine.ops import Weight
from specvlm.models.quantize import quantize
from specvlm.results.metrics import tokens_of
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, ancestor_mask

pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("specvlm.engine.kernels", reason="Triton is not installed") if torch.cuda.is_available() else None
HEADS = [(40, 8, 128), (28, 4, 128), (16, 2, 128), (64, 8, 128), (4, 4, 64)]  # of 32B, 7B, 3B, 72B, and one without groups


def error(ours: torch.Tensor, right: torch.Tensor) -> float:
    ours, right = ours.double(), right.double()
    return float((ours - right).norm() / right.norm())


def random_tree(count: int, seed: int) -> torch.Tensor:
    """Make the (M, M) int8 mask of a random tree."""
    chance = random.Random(seed)
    return ancestor_mask((-1, *(chance.randrange(node) for node in range(1, count)))).to("cuda", torch.int8)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 25, 26, 33, 64])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 1000, 4097])
@torch.inference_mode()
def test_attention(heads, rows, length):
    count, kv, width = heads
    generator = torch.Generator("cuda").manual_seed(rows + length)
    keys, values = (
        torch.randn(kv, length + 130, width, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    q = torch.randn(rows, count, width, device="cuda", generator=generator).to(torch.bfloat16)
    base = torch.tensor([length], device="cuda")
    seen = random_tree(rows, rows)
    assert error(kernels.attention(q, keys, values, base, seen, 0.1), ops.attention(q, keys, values, base, seen, 0.1)) < 6e-3
    # A level of a tree: some rows that stand before it are seen by some of its rows.
    level = torch.cat(
        [(torch.rand(rows, 5, device="cuda") < 0.5).to(torch.int8), torch.eye(rows, device="cuda").to(torch.int8)], 1
    )
    ours, right = (f.attention(q, keys, values, base, level, 0.1) for f in (kernels, ops))
    assert error(ours, right) < 6e-3


@pytest.mark.parametrize("length", [65_537, 131_072])
@torch.inference_mode()
def test_attention_over_long_contexts(length):
    keys, values = (torch.randn(8, length + 64, 128, device="cuda").to(torch.bfloat16) for _ in range(2))
    q, base, seen = (
        torch.randn(26, 40, 128, device="cuda").to(torch.bfloat16),
        torch.tensor([length], device="cuda"),
        random_tree(26, 1),
    )
    ours = kernels.attention(q, keys, values, base, seen, 0.3)
    assert error(ours, ops.attention(q, keys, values, base, seen, 0.3)) < 1e-2


@pytest.mark.parametrize("kind", ["full", "fp8", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 26, 64])
@torch.inference_mode()
def test_linear_layers(kind, rows):
    """In 8 and 4 bits, rows are quantised in groups too: the difference is that rounding only, in float32 sums."""
    layers = [nn.Linear(1024, n, bias=False, device="cuda", dtype=torch.bfloat16) for n in (512, 128, 200)]
    layers = layers if kind == "full" else [quantize(layer, kind) for layer in layers]
    weights = tuple(map(Weight.of, layers))
    x, ones = torch.randn(rows, 1024, device="cuda").to(torch.bfloat16), torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    fast, plain = (f.add_norm(x, None, ones, 1e-6, kind)[1] for f in (kernels, ops))
    bound = {"full": 4e-3, "int8": 1.2e-2, "int4": 1.2e-2, "fp8": 4e-2}[kind]
    assert error(kernels.linear(fast, weights).sum(0), ops.linear(plain, weights)[0]) < bound
    assert error(kernels.linear(fast, weights[:1], whole=torch.bfloat16), ops.linear(plain, weights[:1])) < bound
    gated = kernels.gated(fast, weights[0], weights[0], torch.bfloat16, kind)
    if kind != "full":
        gated = (gated.data.float().unflatten(1, (-1, kernels.GROUP)) * gated.scale[..., None]).flatten(1)
    assert error(gated, ops.gated(plain, weights[0], weights[0], torch.bfloat16)) < 2.5 * bound


@torch.inference_mode()
def test_a_row_is_rounded_alike_alone_and_among_others():
    weights = (Weight.of(nn.Linear(2048, 1024, bias=False, device="cuda", dtype=torch.bfloat16)),)
    x = torch.randn(26, 2048, device="cuda").to(torch.bfloat16)
    together = kernels.linear(x, weights)
    alone = torch.cat([kernels.linear(x[row : row + 1], weights) for row in range(26)], 1)
    assert torch.equal(together, alone)


@torch.inference_mode()
def test_top():
    x = torch.randn(8, 152_064, device="cuda").to(torch.bfloat16)
    for count in (1, 4, 8):
        ours = kernels.top(x[:, :151_936], count)
        assert torch.equal(x.gather(1, ours), x[:, :151_936].topk(count).values)
        assert all(len(set(row)) == count for row in ours.tolist())


def on_gpu(family: str, dtype: torch.dtype):
    import copy

    return [tiny.wrap(copy.deepcopy(lm(family, dtype=dtype).hf).cuda()) for lm in (tiny.model, tiny.draft_of)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "drafter", ["tree", "wide", "chain", "self", "prompt_lookup", "dynamic_tree", "entropy_tree", "sparse"]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_is_eager_is_generate(family, drafter, dtype):
    from test_engine import DRAFTERS

    from specvlm.engine import Engine, engine_for
    from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
    from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
    from specvlm.strategies.drafters.sparse import SparseDrafter

    more = {"dynamic_tree": DynamicTreeDrafter(), "entropy_tree": EntropyTreeDrafter(), "sparse": SparseDrafter(entries=24)}
    chosen = (DRAFTERS | more)[drafter]
    target, draft = on_gpu(family, dtype)
    for pruner, ratio in ((UniformPruner(), 0.5), (TwoStagePruner(), 0.9)):
        outs = []
        for engine in (Engine(), engine_for("graphs", "cuda")):
            graph = DecodingGraph(
                target, draft, pruner, chosen, GreedyVerifier(), GenerationOptions(ratio=ratio), engine=engine
            )
            for seed in range(3):
                request = tiny.prompt(family, seed=seed, frames=3 + seed)
                outs.append(tokens_of(list(graph.decode(request, 24))))
                alone = autoregressive(target, request, 24, GreedyVerifier(), caches=graph.caches, engine=engine)
                assert outs[-1] == tokens_of(list(alone)) == tiny.hf_greedy(target, request, 24)
        assert outs[:3] == outs[3:]


def test_sampling_runs_captured():
    from specvlm.engine import Engine, engine_for
    from specvlm.strategies.drafters.tree import TreeDrafter

    target, draft = on_gpu("qwen2_5_vl", torch.float32)
    verifier, request = SamplingVerifier(temperature=0.8, top_k=20, top_p=0.95), tiny.prompt("qwen2_5_vl")
    engines = (Engine(), engine_for("graphs", "cuda"))
    alone = [tokens_of(list(autoregressive(target, request, 24, verifier, engine=e))) for e in engines]
    assert alone[0] == alone[1]
    steps = list(
        DecodingGraph(
            target, draft, UniformPruner(), TreeDrafter(), verifier, GenerationOptions(ratio=0.5), engine=engines[1]
        ).decode(request, 40)
    )
    assert len(tokens_of(steps)) == 40 and sum(s.accepted for s in steps) > 10


def captured_graph() -> DecodingGraph:
    from specvlm.engine import engine_for
    from specvlm.strategies.drafters.tree import TreeDrafter

    target, draft = on_gpu("qwen2_5_vl", torch.float32)
    strategies = (UniformPruner(), TreeDrafter(), GreedyVerifier())
    return DecodingGraph(target, draft, *strategies, GenerationOptions(ratio=0.5), engine=engine_for("graphs", "cuda"))


def test_no_memory_grows_over_fifty_requests():
    graph = captured_graph()
    requests = [tiny.prompt("qwen2_5_vl", seed=s, frames=2 + s % 7) for s in range(7)]
    want = [tokens_of(list(graph.decode(r, 16))) for r in requests]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(50):
        assert tokens_of(list(graph.decode(requests[number % 7], 16))) == want[number % 7]
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) <= before


def test_models_go_with_what_was_captured_for_them():
    import gc
    from weakref import ref

    from specvlm.engine import engine_for

    engine, gone = engine_for("graphs", "cuda"), []
    for _ in range(2):
        lm = on_gpu("qwen2_5_vl", torch.float32)[0]
        list(autoregressive(lm, tiny.prompt("qwen2_5_vl"), 4, GreedyVerifier(), engine=engine))
        gone.append(ref(lm.text))
        del lm
        gc.collect()
    assert gone[0]() is None and len(engine._programs) == 1


def test_a_request_after_one_that_failed_midway():
    from test_engine import outlives_a_failure

    graph = captured_graph()
    requests = [tiny.prompt("qwen2_5_vl", seed=s, frames=f) for s, f in ((0, 4), (1, 2), (2, 80), (3, 4))]
    outlives_a_failure(graph, requests, [tiny.hf_greedy(graph.target, r, 16) for r in requests])


@pytest.mark.parametrize("device", [[], ["device=cuda"], ["device=cuda:0"]], ids=["auto", "cuda", "cuda:0"])
def test_a_run_by_the_command_line(device, tmp_path):
    import json

    from specvlm.__main__ import main

    assert main([f"hydra.run.dir={tmp_path / 'out'}", "question=how many objects appear?", "max_new_tokens=14", *device]) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["verdict"] == "identical" and set(summary["engine"].values()) == {"graphs"}
