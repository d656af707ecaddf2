"""Grown trees hold the best nodes of all guesses, are connected, and are captured once for all shapes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import tiny
import torch

from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.pauses import finished
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyPace, EntropyTreeDrafter
from specvlm.strategies.drafters.growing import Growth, _confidence, grow, unpacked
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers import greedy
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions

V = 6


def decode(family, drafter, engine=None, verifier=None, ratio=0.5, pruner=None, limit=30, draft=None):
    graph = DecodingGraph(
        tiny.model(family),
        draft or tiny.draft_of(family),
        pruner or UniformPruner(),
        drafter,
        verifier or GreedyVerifier(),
        GenerationOptions(ratio=ratio),
        engine=engine or Engine(),
    )
    return list(graph.decode(tiny.prompt(family), limit))


class Model:
    """Model with invented logits that depend on the whole path, so that a wrong mask shows. Row 0 is the root's."""

    def __init__(self, seed: int) -> None:
        self.seed, self.tokens = seed, []

    def logits(self, way: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, way)) % 2**31)
        return 2 * torch.randn(V, generator=generator, dtype=torch.float64)

    def expand(self, tokens_W, depth, seen_WR):
        self.tokens += tokens_W.tolist()
        ways = [tuple(t for t, seen in zip(self.tokens, row.tolist(), strict=True) if seen) for row in seen_WR]
        assert all(len(way) == depth for way in ways)
        return torch.stack([self.logits(way) for way in ways])


def ways_of(grown) -> list[tuple[int, ...]]:
    ways: list[tuple[int, ...]] = [()]
    tokens, parents, *_ = unpacked(grown.packed().tolist())
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        ways.append((*ways[parent], token))
    return ways


def brute_force(model: Model, depth: int, width: int, nodes: int) -> set[tuple[int, ...]]:
    """EAGLE-2 in plain Python: expand, then re-rank."""
    values, every = {(): 0.0}, {}
    for _ in range(depth):
        below = {}
        for way, value in values.items():
            best = model.logits(way).log_softmax(-1).topk(width)
            for chance, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                below[(*way, token)] = value + chance
        every |= below
        values = dict(sorted(below.items(), key=lambda pair: -pair[1])[:width])
    return {way for way, _ in sorted(every.items(), key=lambda pair: -pair[1])[:nodes]}


@pytest.mark.parametrize(("depth", "width", "nodes"), [(1, 4, 4), (1, 4, 2), (2, 2, 6), (4, 3, 12), (6, 3, 25), (3, 6, 25)])
@pytest.mark.parametrize("seed", range(9))
def test_the_tree_is_the_best_of_what_was_expanded(depth, width, nodes, seed):
    model = Model(seed)
    growth = Growth((width,) * depth, (width,) * (depth - 1), nodes)
    grown = finished(grow(torch.tensor([3]), model.logits(())[None], growth, model.expand), None)
    ways = ways_of(grown)
    assert grown.tokens_M[0] == 3 and grown.parents_M[0] == -1 and grown.rows_M[0] == 0
    assert all(parent < node for node, parent in enumerate(grown.parents_M.tolist()))
    assert set(ways[1:]) == brute_force(model, depth, width, nodes) and len(set(ways)) == nodes + 1
    for way, row in zip(ways[1:], grown.rows_M.tolist()[1:], strict=True):
        if row >= 0:  # the row that was written for this very node
            assert model.tokens[row - 1] == way[-1]
    expanded = {way for way, row in zip(ways, grown.rows_M.tolist(), strict=True) if row >= 0}
    assert {way[:-1] for way in ways[1:]} <= expanded


@pytest.mark.parametrize(("depth", "width", "nodes"), [(2, 2, 6), (4, 3, 12), (6, 3, 25), (3, 5, 40)])
def test_where_nodes_tie_with_their_cousins_any_of_them_will_do(depth, width, nodes):
    """All nodes have the same distribution: a path is as likely as its tokens in another order."""
    model = Model(0)
    model.logits = lambda way: Model.logits(model, ())
    growth = Growth((width,) * depth, (width,) * (depth - 1), nodes)
    grown = finished(grow(torch.tensor([3]), model.logits(())[None], growth, model.expand), None)
    p = model.logits(()).softmax(-1).tolist()

    def worth(ways):
        return sorted(math.prod(p[token] for token in way) for way in ways)

    assert worth(ways_of(grown)[1:]) == pytest.approx(worth(brute_force(model, depth, width, nodes)), rel=1e-12)
    assert all(0 <= parent < node for node, parent in enumerate(grown.parents_M.tolist()) if node)


def test_equal_probabilities_keep_the_tree_connected():
    """A draft that is certain: second guesses have probability 0, and first ones that of the root."""
    certain = torch.full((1, V), -1e9).double()
    certain[0, 2] = 0.0
    growth = Growth((2,) * 4, (2,) * 3, 9)
    grown = finished(grow(torch.tensor([0]), certain, growth, lambda tokens, *_: certain.expand(len(tokens), -1)), None)
    assert all(0 <= parent < node for node, parent in enumerate(grown.parents_M.tolist()) if node)
    assert (2, 2, 2, 2) in ways_of(grown)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("drafter", [DynamicTreeDrafter(), EntropyTreeDrafter()], ids=repr)
def test_output_is_generates_at_every_ratio(family, drafter):
    expected = tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 30)
    for ratio in (0, 0.5, 0.9, 1):
        assert tokens_of(decode(family, drafter, ratio=ratio)) == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_draft_that_is_the_target_is_accepted_to_the_full_depth(family):
    chain = DynamicTreeDrafter(nodes=5, depth=5, width=1)
    assert acceptance_of(decode(family, chain, pruner=NonePruner(), draft=tiny.model(family)))["accepted_per_round"] == 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"),
    # Tracing takes long: the same programs are traced of the other family below, for an entropy tree.
    [*((family, "direct") for family in tiny.FAMILIES), ("llava_onevision", "traced")],
)
def test_graphs_is_eager(family, backend):
    size = dict(nodes=12, depth=4, width=4) if backend == "direct" else dict(nodes=9, depth=3, width=3)
    drafter = DynamicTreeDrafter(**size)
    eager = decode(family, drafter, ratio=0.9)
    graphs = decode(family, drafter, GraphsEngine(backend), ratio=0.9)
    assert tokens_of(graphs) == tokens_of(eager) == tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 30)
    assert [s.accepted for s in graphs] == [s.accepted for s in eager]
    assert len({s.accepted for s in graphs}) > 1


def test_one_capture_of_the_check_and_one_of_the_growth_serve_every_shape():
    engine = GraphsEngine("direct")
    steps = decode("qwen2_5_vl", DynamicTreeDrafter(), engine, ratio=0.9, limit=60)
    assert len(steps) > 8 and sorted(key[0] for key in engine._programs) == ["check", "draft"]
    assert sum("capture" in step.times_s for step in steps[1:]) == 1


def test_a_capture_writes_no_row_of_the_prompt(monkeypatch):
    """Caches are exactly full."""
    monkeypatch.setattr("specvlm.models.kv_cache.pooled", lambda slots: slots)
    drafter = DynamicTreeDrafter(nodes=12, depth=12, width=1)
    steps = decode("qwen2_5_vl", drafter, GraphsEngine("direct"), pruner=NonePruner(), draft=tiny.model("qwen2_5_vl"), limit=6)
    assert [step.accepted for step in steps] == [0, 12]


def test_a_shape_that_varies_is_kept_nowhere():
    greedy._layout.cache_clear()
    decode("qwen2_5_vl", DynamicTreeDrafter(), Engine(), ratio=0.9)
    decode("qwen2_5_vl", DynamicTreeDrafter(), GraphsEngine("direct"), ratio=0.9)
    assert greedy._layout.cache_info().currsize <= 1  # the tree of one node


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
def test_repetition_penalty_and_sampling(engine, monkeypatch):
    family, drafter = "qwen2_5_vl", DynamicTreeDrafter(nodes=10, depth=3, width=4)
    sampled = decode(family, drafter, engine, SamplingVerifier(0.8, top_k=20))
    assert tokens_of(sampled) == tokens_of(decode(family, drafter, Engine(), SamplingVerifier(0.8, top_k=20)))
    plain = tokens_of(decode(family, drafter, engine))
    monkeypatch.setattr(tiny.model(family), "repetition_penalty", 1.3)
    penalised = tokens_of(decode(family, drafter, engine))
    assert penalised == tokens_of(decode(family, TreeDrafter(), Engine())) != plain


# ---- SAGE -------------------------------------------------------------------------------------------------------------


def sage_confidence(logits: list[float]) -> float:
    """From the paper's text: renormalise the ten likeliest tokens; one minus entropy over maximum entropy."""
    weights = [math.exp(logit - max(logits)) for logit in sorted(logits)[-10:]]
    shares = [weight / sum(weights) for weight in weights]
    return 1 + sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


def sage_tree(model: SageModel, depth: int, width: int) -> dict[tuple[int, ...], float]:
    """From the paper's text, node by node: paths and their probabilities, without the limit of 64."""
    tree, frontier = {}, {(): 1.0}
    for level in range(1, depth + 1):
        below = {}
        for way, chance in frontier.items():
            table = model.table(way)
            count = max(1, math.floor(width * (1 / level) * (0.5 + chance)))
            for token in sorted(table, key=lambda token: -table[token])[:count]:
                below[(*way, token)] = chance * table[token]
        tree |= below
        frontier = {way: chance for way, chance in below.items() if chance > 0.1 * level / depth}
    return tree


class SageModel(Model):
    """Invented distributions over 20 tokens, with distinct probabilities per row.

    kind: `alike` (the same for all nodes, so that nodes tie with their cousins), `sure`, `flat` or `random`.
    """

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__(seed)
        self.kind = kind

    def logits(self, way: tuple[int, ...]) -> torch.Tensor:
        chance = random.Random(f"{self.seed} {() if self.kind == 'alike' else way}")
        scale = {"sure": 9.0, "flat": 0.3}.get(self.kind) or chance.choice((0.5, 1.0, 2.0, 4.0))
        return torch.tensor(chance.sample([scale * step / 5 for step in range(20)], 20), dtype=torch.float64)

    def table(self, way: tuple[int, ...]) -> dict[int, float]:
        logits = self.logits(way).tolist()
        total = sum(map(math.exp, logits))
        return {token: math.exp(logit) / total for token, logit in enumerate(logits)}


@pytest.mark.parametrize("seed", range(13))
@pytest.mark.parametrize("kind", ["random", "alike", "sure", "flat"])
def test_an_entropy_tree_is_sages(kind, seed):
    drafter = EntropyTreeDrafter()
    confidence = sage_confidence(SageModel(seed, kind).logits(()).tolist())
    for share in {confidence, seed / 12}:
        depth, width = round(3 + share * 5), round(2 + (1 - share) * 8)
        assert drafter.extent(share, 8) == (depth, width)
        expected = sage_tree(SageModel(seed, kind), depth, width)
        growth = drafter.growth(depth, width)
        for step, nodes in ((1, 1000), (1, 63), (8, 63)):
            model = SageModel(seed, kind)
            grown = finished(
                grow(torch.tensor([3]), model.logits(())[None], replace(growth, step=step, nodes=nodes), model.expand), None
            )
            ways = ways_of(grown)[1:]
            assert len(set(ways)) == len(ways) <= nodes
            if nodes == 1000:
                assert set(ways) == set(expected)
            elif len(expected) > nodes:
                # The most probable ones, of which several may be worth as much as the last.
                worth = sorted(expected.values(), reverse=True)
                assert set(ways) <= set(expected)
                assert sorted((expected[way] for way in ways), reverse=True) == pytest.approx(worth[:nodes], rel=1e-12)
            else:
                assert set(ways) >= set(expected) and len(ways) - len(expected) < step
                assert (len(ways) + 1) % step == 0
            for way, row in zip(ways, unpacked(grown.packed().tolist())[2][1:], strict=True):
                assert row < 0 or model.tokens[row - 1] == way[-1]
            assert unpacked(grown.packed().tolist())[3] == pytest.approx(confidence, abs=1e-12)


def test_half_a_chance_and_a_uniform_rest_give_depth_8_and_width_2():
    """Out of 150,000 tokens: the entropy over all of them would give the opposite."""
    p = torch.full((1, 150_000), 0.5 / 149_999, dtype=torch.float64)
    p[0, 77] = 0.5
    confidence = float(_confidence(p.log(), 10))
    assert confidence == pytest.approx(sage_confidence(p.log()[0].tolist()), abs=1e-12) and confidence > 0.99
    assert EntropyTreeDrafter().extent(confidence, 8) == (8, 2)


@pytest.mark.parametrize(
    ("logits", "confidence"), [([0.0] * 50, 0.0), ([0.0] + [-1e9] * 49, 1.0), ([0.0] * 4, 0.0), ([5.0], 1.0)]
)
def test_confidence_at_its_ends(logits, confidence):
    assert float(_confidence(torch.tensor([logits]), 10)) == pytest.approx(confidence, abs=1e-12)


def test_the_history_moves_the_greatest_depth_within_its_bounds():
    drafter = EntropyTreeDrafter()
    pace, deepest, seen, chance = drafter.pace(), 8, [], random.Random(0)
    assert pace.extent == (6, 6)  # of a confidence of 0.5
    for round_ in range(200):
        accepted, confidence = chance.choice(((0, 1), (2, 3), (4, 8))[round_ // 20 % 3]), chance.random()
        seen.append(accepted)
        mean = sum(seen[-10:]) / len(seen[-10:])
        deepest = max(3, deepest - 1) if mean < 2 else min(8, deepest + 1) if mean > 3 else deepest
        pace.went(accepted, confidence)
        assert pace.deepest == deepest and pace.extent == drafter.extent(confidence, deepest)
        assert pace.extent in drafter.extents()
    assert drafter.pace().extent == (6, 6), "another request knows nothing of it"


@pytest.mark.parametrize(
    "drafter", [EntropyTreeDrafter(), EntropyTreeDrafter(20, 6, 1, 1, 6), EntropyTreeDrafter(5, 2, 3, 2, 3)]
)
def test_every_extent_is_known_ahead(drafter):
    extents = drafter.extents()
    assert len(set(extents)) == len(extents)
    for deepest in range(drafter.shallow, drafter.deep + 1):
        assert {drafter.extent(step / 4000, deepest) for step in range(4001)} <= set(extents)
    for extent in extents:
        assert 1 + sum(drafter.growth(*extent).rows) <= drafter.max_rows and len(drafter.growth(*extent).columns) == extent[0]


class WarmsUp(GraphsEngine):
    """Engine that runs what it captures on the example inputs, as capturing a CUDA graph does."""

    def capture(self, fn, inputs, backend, tables):
        for _ in "12":
            fn(*[value.clone() for value in inputs])
        return super().capture(fn, inputs, backend, tables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "drafter", "family"),
    [
        *(("direct", EntropyTreeDrafter(20, 6, 1, 2, 5), family) for family in tiny.FAMILIES),
        ("traced", EntropyTreeDrafter(7, 2, 2, 2, 2), "qwen2_5_vl"),  # one extent: compiling takes long
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_entropy_tree_is_captured_by_extent(backend, drafter, family, monkeypatch):
    """Caches are exactly full, and some trees are shallower than what was accepted of the one before.

    Some programs are captured before accepted rows have moved.
    """
    monkeypatch.setattr("specvlm.models.kv_cache.pooled", lambda slots: slots)
    told, extents = [], drafter.extents()
    extents = extents[::2] + extents[1::2]

    def went(self, accepted, confidence):
        told.append((accepted, confidence))
        self.extent = extents[len(told) % len(extents)]

    monkeypatch.setattr(EntropyPace, "went", went)
    engine, draft = WarmsUp(backend), tiny.draft_of(family, 0.005)
    eager = decode(family, drafter, pruner=NonePruner(), draft=draft)
    heard, told = told, []
    graphs = decode(family, drafter, engine, pruner=NonePruner(), draft=draft)
    assert tokens_of(graphs) == tokens_of(eager) == tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 30)
    assert [(s.accepted, s.tree and s.tree.parents) for s in graphs] == [(s.accepted, s.tree and s.tree.parents) for s in eager]
    assert [accepted for accepted, _ in told] == [accepted for accepted, _ in heard]
    assert [share for _, share in told] == pytest.approx([share for _, share in heard], abs=1e-9)
    grown = [key for key in engine._programs if key[0] == "draft"]
    captured = [before.accepted for before, s in itertools.pairwise(graphs) if "capture" in s.times_s]
    assert len(grown) == len(extents) == 1 or (len(grown) > 1 and max(captured) > 1)


@pytest.mark.parametrize("fields", [dict(nodes=50, depth=2, width=3), dict(depth=0), dict(width=0), dict(nodes=0)])
def test_extents_without_enough_guesses_are_refused(fields):
    with pytest.raises(ValueError, match="guesses to choose|at least 1"):
        DynamicTreeDrafter(**fields)


@pytest.mark.parametrize("fields", [dict(shallow=9), dict(narrow=11), dict(shallow=0), dict(narrow=0)])
def test_extents_in_the_wrong_order_are_refused(fields):
    with pytest.raises(ValueError, match="1 <= shallow <= deep and 1 <= narrow <= wide, got "):
        EntropyTreeDrafter(**fields)


def test_a_draft_without_a_distribution_is_unsure():
    pace = EntropyTreeDrafter().pace()
    for logits_1V in (torch.full((1, 40), math.nan), torch.full((1, 40), -math.inf)):
        confidence_1 = _confidence(logits_1V, 10)
        pace.went(0, float(confidence_1))
        assert confidence_1.tolist() == [0.0] and pace.extent == (3, 10)


def test_a_mean_acceptance_of_just_two_or_three_moves_nothing():
    drafter = EntropyTreeDrafter()
    for accepted, then in ((2, 6), (3, 6), (1, 5), (4, 7)):
        pace = drafter.pace()
        pace.deepest = 6
        pace.went(accepted, 1.0)
        assert pace.extent == (then, 2)
