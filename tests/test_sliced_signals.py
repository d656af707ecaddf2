"""Signals of the text that an exact engine reads from its own slices, instead of a pass of Hugging Face's modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import tiny
import torch

from specvlm.decoding.collect import collector_for, gathered
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefill import prefill
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.timing import Clock
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.exact_prefill import reads_slices
from specvlm.models.attention import AttentionCollector
from specvlm.models.attention_sums import attention_sums
from specvlm.models.text_passes import TextPasses
from specvlm.models.vision_probe import HiddenStateProbe
from specvlm.results.metrics import tokens_of
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, KeepSet

PER_ROW = {
    "verifier_attention", "verifier_attention_per_layer", "verifier_attention_per_kv_head", "verifier_attention_last_row",
    "verifier_attention_weighted", "key_norm", "key_norm_text",
}  # fmt: skip


@dataclass(frozen=True)
class Attentive(Pruner):
    """Notes the signals that a lean pass can give, and keeps the first tokens."""

    name = "attentive"
    needs = frozenset(PER_ROW)
    seen: list = field(default_factory=list, compare=False)

    def state_layer(self, layers: int) -> int:
        return 2

    def row_weights(self, text_TD, features_ND):
        return torch.arange(1.0, len(text_TD) + 1)

    def select(self, ctx: PruneContext) -> KeepSet:
        self.seen.append({name: ctx.signal(name).clone() for name in PER_ROW})
        return KeepSet(torch.arange(ctx.budget), ctx.total)


@pytest.fixture
def exact(monkeypatch):
    """Treat the arithmetic of plain operations as exact, in slices of few rows."""
    monkeypatch.setattr(GraphsEngine, "exact", lambda engine, model: True)
    monkeypatch.setattr("specvlm.engine.exact_prefill.ROWS", 4)


@pytest.fixture
def module_rows(monkeypatch):
    """Slots that Hugging Face's modules compute for each model, pass by pass."""
    found, layers = [], TextPasses._layers

    def counted(lm, embeds, positions, cache, *more):
        found.append((lm, cache.length, cache.length + len(embeds)))
        return layers(lm, embeds, positions, cache, *more)

    monkeypatch.setattr(TextPasses, "_layers", counted)
    return found


def graph_of(family, pruner, store=None) -> DecodingGraph:
    models = tiny.model(family), tiny.draft_of(family)
    options = GenerationOptions(8, 0.5)
    graph = DecodingGraph(*models, pruner, TreeDrafter("2x1"), GreedyVerifier(), options, engine=GraphsEngine("direct"))
    graph.prefixes = store
    return graph


def asking(prompt, *words):
    return replace(prompt, tokens=torch.cat([prompt.tokens[: prompt.cut], torch.tensor(words)]))


def signals_of(family, request, pruner, engine):
    lm = tiny.model(family)
    collector = collector_for(pruner, lm, request)
    features, _ = prefill(lm, request, lm.new_cache(len(request)), Clock(lm.device), collector, engine)
    return gathered(pruner.needs, request, collector, features)


@pytest.mark.parametrize("words", [1, 2, 7, 19])
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_signals_of_slices_are_those_of_one_pass_of_modules(family, videos, words, exact, module_rows):
    request = asking(tiny.prompt(family, videos=videos, images=1), *range(30, 30 + words))
    with torch.inference_mode():
        want = signals_of(family, request, Attentive(), Engine())
        module_rows.clear()
        found = signals_of(family, request, Attentive(), GraphsEngine("direct"))
    assert max(end for _, _, end in module_rows) == request.cut
    assert want.keys() == found.keys() == PER_ROW
    for name in PER_ROW:
        torch.testing.assert_close(found[name], want[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_hit_has_the_bits_of_a_miss_and_runs_no_row_of_the_target_through_modules(family, exact, module_rows):
    pruner = Attentive()
    graph, alone = (graph_of(family, pruner, store) for store in (PrefixStore(2**30), None))
    prompt = tiny.prompt(family)
    question = prompt.tokens[prompt.cut :].tolist()
    asked = [prompt, asking(prompt, 30, 31), asking(prompt, *question, 9, 8, 7, 6, 20, 21), asking(prompt, *question[:-2], 50)]
    for number, request in enumerate(asked):
        module_rows.clear()
        steps = list(graph.decode(request))
        rows = [one for one in module_rows if one[0] is graph.target]
        assert not rows if number else rows and max(end for *_, end in rows) == prompt.cut
        assert steps[0].reused.tokens == (prompt.cut if number else 0)  # all of the text is read
        assert tokens_of(steps) == tokens_of(list(alone.decode(request)))
        hit, miss = pruner.seen[-2:]
        assert all(torch.equal(hit[name], miss[name]) for name in PER_ROW)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_that_two_stage_keeps_are_those_of_the_eager_engine(family, exact):
    graph = graph_of(family, TwoStagePruner())
    eager = graph_of(family, TwoStagePruner())
    eager.engine = Engine()
    for words in ((30, 31), tuple(range(40, 51))):
        request = asking(tiny.prompt(family), *words)
        found, want = (next(s.keep.index for s in one.decode(request) if s.keep is not None) for one in (graph, eager))
        assert found.tolist() == want.tolist()


@pytest.mark.parametrize("how", ["hidden states", "an early stop", "an image behind the video"])
def test_what_the_lean_pass_cannot_give_is_read_from_modules(how):
    prompt = tiny.prompt("qwen2_5_vl")
    more = {
        "hidden states": {"states": HiddenStateProbe(prompt.video_index, prompt.cut, 1, torch.ones(32))},
        "an early stop": {"depth": 1},
    }
    if how == "an image behind the video":
        prompt = replace(prompt, image_index=torch.tensor([prompt.cut + 2]))
    assert not reads_slices(prompt, AttentionCollector(prompt.video_index, **more.get(how, {})))
    assert reads_slices(tiny.prompt("qwen2_5_vl"), AttentionCollector(prompt.video_index))


def naive(query_HGQD, key_HKD, scaling, index_N):
    """(H, G, Q, N) attention of the last rows of a causal pass."""
    rows, keys = query_HGQD.shape[2], key_HKD.shape[1]
    scores = torch.einsum("hgqd,hkd->hgqk", query_HGQD, key_HKD) * scaling
    for row in range(rows):
        scores[:, :, row, keys - rows + row + 1 :] = float("-inf")
    return scores.softmax(-1)[..., index_N]


@pytest.mark.parametrize("block", [1, 2_000, 2**28])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 3, 4, 9), (4, 1, 7, 7), (2, 7, 11, 40)])
def test_sums_are_those_of_the_plain_formula_in_blocks_of_any_size(shape, block, monkeypatch):
    monkeypatch.setattr("specvlm.models.attention_sums.BLOCK", block)
    heads, group, rows, keys = shape
    random = torch.Generator().manual_seed(sum(shape))
    query, key, weights = (
        torch.randn(size, generator=random, dtype=torch.float64)
        for size in ((heads, group, rows, 8), (heads, keys, 8), (rows,))
    )
    index = torch.randperm(keys, generator=random)[: keys // 2 + 1].sort().values
    every = naive(query, key, 0.3, index)
    for first in {0, rows - 1}:
        sums = attention_sums(query, key, 0.3, index, first, None if first else weights)
        torch.testing.assert_close(sums.heads_HN, every[:, :, first:].sum((1, 2)))
        torch.testing.assert_close(sums.last_N, every[:, :, -1].sum((0, 1)))
        want = every.sum((0, 1)).mT @ weights
        torch.testing.assert_close(sums.weighted_N, torch.zeros_like(want) if first else want)


@pytest.mark.parametrize("cuts", [[0, 9], [0, 1, 9], [0, 4, 8, 9], [*range(10)]])
def test_a_collector_may_see_the_rows_in_several_passes(cuts):
    random, index = torch.Generator().manual_seed(3), torch.arange(2, 17)
    query, key = (torch.randn(1, heads, 29, 8, generator=random, dtype=torch.float64) for heads in (6, 2))
    query, rows = query[:, :, -9:], 9
    found = []
    for borders in ([0, rows], cuts):
        one = AttentionCollector(index, last_row=True, heads=True, weigh=lambda rows, features: rows[:, 0], keys=0)
        one._weights_Q = torch.linspace(0.1, 1, rows, dtype=torch.float64)
        for start, end in pairwise(borders):
            given = query[:, :, start:end], key[:, :, : 20 + end], 0.4
            one.observe(0, *given, (start, rows))
        found.append([one.per_layer(), one.last_rows(), one.per_head(), one.weighted(), *one.key_norms()])
    for mine, whole in zip(*found, strict=True):
        torch.testing.assert_close(mine, whole)
