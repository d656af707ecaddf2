"""Sparse-to-Dense: the compact cache holds the chosen rows, and with all rows the draft equals the target."""

from __future__ import annotations

import pytest
import tiny
import torch
from rounding import additions, assert_same_sums

from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models import memory_plan
from specvlm.models.attention import AttentionCollector
from specvlm.models.kv_cache import pooled
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions


def graph_of(family, drafter, engine=None, verifier=None):
    return DecodingGraph(
        tiny.model(family),
        None,
        TwoStagePruner(),
        drafter,
        verifier or GreedyVerifier(),
        GenerationOptions(ratio=0.9),
        engine=engine or Engine(),
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
@pytest.mark.parametrize("request_of", [dict(), dict(videos=2, images=1)], ids=str)
def test_with_all_entries_every_guess_is_accepted(family, engine, request_of):
    request = tiny.prompt(family, **request_of)
    steps = list(graph_of(family, SparseDrafter(), engine).decode(request, 60))
    assert tokens_of(steps) == tiny.hf_greedy(tiny.model(family), request, 60)
    found = acceptance_of(steps)
    assert found["accepted_per_round"] == 9.0 and found["acceptance_by_depth"] == [1.0] * 9


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("entries", [1, 20, 30])
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
def test_output_is_generates_with_few_entries_or_none(family, entries, engine):
    request = tiny.prompt(family)
    steps = list(graph_of(family, SparseDrafter(entries, 4), engine).decode(request, 30))
    assert tokens_of(steps) == tiny.hf_greedy(tiny.model(family), request, 30)
    assert any(step.accepted < 4 for step in steps[1:])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_by_head_is_the_one_of_the_naive_softmax(family):
    """Against scores from the cache itself; the mean over heads is the signal that pruners read."""
    lm, request = tiny.model(family), tiny.prompt(family)
    index, seen = request.video_index, {}
    collector, observe = AttentionCollector(index, heads=True), AttentionCollector.observe

    def spy(self, layer, query, key, scaling):
        scores = query[0] @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT * scaling
        count, total = scores.shape[-2:]
        future = torch.ones(count, total, dtype=torch.bool).triu(total - count + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)[..., index].mean(1)
        seen[layer] = weights.unflatten(0, (key.shape[1], -1)).mean(1)
        observe(self, layer, query, key, scaling)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionCollector, "observe", spy)
        cache = lm.new_cache(len(request))
        lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut, collector)
    terms = additions(lm.hf, len(request))
    assert_same_sums(collector.per_head(), torch.stack([seen[layer] for layer in sorted(seen)]), terms)
    assert_same_sums(collector.per_head().mean(1), collector.per_layer(), terms)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_compact_cache_holds_each_heads_own_best_and_all_text_in_order(family):
    request, drafter, found = tiny.prompt(family), SparseDrafter(24, 3), {}
    graph = graph_of(family, drafter)
    start = SparseDrafter.start

    def spy(self, ctx):
        session = start(self, ctx)
        found["keys"] = session.cache.keys[:, 0, :, : session.cache.length].clone()
        found["dense"] = ctx.cache.keys[:, 0].clone()
        found["scores"] = ctx.signal("verifier_attention_per_kv_head")
        found["positions"] = (session.cache.position, ctx.cache.position)
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseDrafter, "start", spy)
        list(graph.decode(request, 8))
    video, kept = set(request.video_index.tolist()), drafter.own_budget(request)
    assert 0 < kept < len(video) and found["positions"][0] == found["positions"][1]
    chosen = set()
    for layer, scores_JN in enumerate(found["scores"]):
        for head, scores_N in enumerate(scores_JN):
            best = sorted(range(len(scores_N)), key=lambda n: (-float(scores_N[n]), n))[:kept]
            slots = sorted({int(request.video_index[n]) for n in best} | (set(range(len(request))) - video))
            torch.testing.assert_close(found["keys"][layer, head], found["dense"][layer, head, slots], rtol=0, atol=0)
            chosen.add(tuple(best))
    assert len(chosen) > 1, "heads of one mind prove nothing"


def test_the_second_cache_is_as_large_as_planned_and_the_pruner_is_not_asked(monkeypatch):
    family, request, drafter = "qwen2_5_vl", tiny.prompt("qwen2_5_vl"), SparseDrafter(24)
    monkeypatch.setattr(TwoStagePruner, "select", None)
    graph = graph_of(family, drafter)
    steps = list(graph.decode(request, 20))
    kept = len(request) - len(request.video_index) + graph.budget(request)
    assert kept == 24 and all(step.keep is None for step in steps)
    slots = pooled(len(request) + 20 + drafter.max_nodes) + pooled(kept + 20 + drafter.max_nodes)
    assert graph.caches.nbytes == memory_plan.kv_bytes(tiny.model(family), slots, torch.float64)


def test_guesses_are_drawn_where_the_verifier_draws():
    sampling = SamplingVerifier(0.8, top_k=20)
    steps = list(graph_of("qwen2_5_vl", SparseDrafter(), verifier=sampling).decode(tiny.prompt("qwen2_5_vl"), 40))
    assert acceptance_of(steps)["accepted_per_round"] == 9.0  # drawn from the target's own distribution
    assert tokens_of(steps) != tiny.hf_greedy(tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), 40)


@pytest.mark.parametrize("fields", [dict(entries=0), dict(length=0)])
def test_sizes_below_one_are_refused(fields):
    with pytest.raises(ValueError, match="at least 1"):
        SparseDrafter(**fields)
