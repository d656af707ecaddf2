"""Trees that are grown: the best nodes of what was guessed, connected, and captured once for all their shapes."""

from __future__ import annotations

import pytest
import tiny
import torch

from specvlm.drafters.dynamic_tree import DynamicTreeDrafter, candidates, grow
from specvlm.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.drafters.tree import TreeDrafter
from specvlm.engine import Engine
from specvlm.engine.graphs import GraphsEngine
from specvlm.graph import DecodingGraph
from specvlm.metrics import acceptance_of, tokens_of
from specvlm.pruners.none import NonePruner
from specvlm.pruners.uniform import UniformPruner
from specvlm.verifiers import greedy
from specvlm.verifiers.greedy import GreedyVerifier
from specvlm.verifiers.sampling import SamplingVerifier

V = 6


def decode(family, drafter, engine=None, verifier=None, ratio=0.5, pruner=None, limit=30, draft=None):
    graph = DecodingGraph(
        tiny.model(family), draft or tiny.draft_of(family), pruner or UniformPruner(), drafter, verifier or GreedyVerifier(),
        ratio, engine=engine or Engine(),
    )  # fmt: skip
    return list(graph.decode(tiny.prompt(family), limit))


class Model:
    """A model of invented logits that go by the whole way, so that a wrong mask shows. Row 0 is the root's."""

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
    for token, parent in zip(grown.tokens_M.tolist()[1:], grown.parents_M.tolist()[1:], strict=True):
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
@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_the_best_of_what_was_expanded(depth, width, nodes, seed):
    model = Model(seed)
    grown = grow(torch.tensor([3]), model.logits(())[None], depth, width, nodes, model.expand)
    ways = ways_of(grown)
    assert grown.tokens_M[0] == 3 and grown.parents_M[0] == -1 and grown.rows_M[0] == 0
    assert all(parent < node for node, parent in enumerate(grown.parents_M.tolist()))
    assert set(ways[1:]) == brute_force(model, depth, width, nodes) and len(set(ways)) == nodes + 1
    for way, row in zip(ways[1:], grown.rows_M.tolist()[1:], strict=True):
        if row >= 0:  # the row that was written for this very node
            assert model.tokens[row - 1] == way[-1]
    expanded = {way for way, row in zip(ways, grown.rows_M.tolist(), strict=True) if row >= 0}
    assert {way[:-1] for way in ways[1:]} <= expanded


def test_equal_probabilities_keep_the_tree_connected():
    """A draft that is certain: its second guesses are worth as much as nothing, its first as much as the root."""
    certain = torch.full((1, V), -1e9).double()
    certain[0, 2] = 0.0
    grown = grow(torch.tensor([0]), certain, 4, 2, 9, lambda tokens, *_: certain.expand(len(tokens), -1))
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
@pytest.mark.parametrize("backend", ["direct", "aot_eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_graphs_is_eager(family, backend):
    drafter = DynamicTreeDrafter(nodes=12, depth=4, width=4)
    eager = decode(family, drafter, ratio=0.9)
    graphs = decode(family, drafter, GraphsEngine(backend), ratio=0.9)
    assert tokens_of(graphs) == tokens_of(eager) == tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 30)
    assert [s.accepted for s in graphs] == [s.accepted for s in eager]
    assert len({s.accepted for s in graphs}) > 1


def test_one_capture_of_the_check_and_one_of_the_growth_serve_every_shape():
    engine = GraphsEngine("direct")
    steps = decode("qwen2_5_vl", DynamicTreeDrafter(), engine, ratio=0.9, limit=60)
    assert len(steps) > 8 and sorted(key[0] for key in engine._programs) == ["check", "grown"]
    assert sum("capture" in step.times_s for step in steps[1:]) == 1


def test_a_capture_writes_no_row_of_the_prompt(monkeypatch):
    """Caches without a slot to spare."""
    monkeypatch.setattr("specvlm.cache.pooled", lambda slots: slots)
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


def test_an_entropy_tree_is_deep_where_sure_and_wide_where_not():
    drafter = EntropyTreeDrafter()
    sure, flat = torch.zeros(1, 50), torch.zeros(1, 50)
    sure[0, 3] = 30.0
    assert drafter.extent(sure) == (8, 3) and drafter.extent(flat) == (3, 10)
    extents = [drafter.extent(sure * share) for share in torch.linspace(0.05, 1, 40).tolist()]
    assert set(extents) <= set(drafter.extents())
    assert extents == sorted(extents) and [w for _, w in extents] == sorted((w for _, w in extents), reverse=True)
    assert all(candidates(*extent) >= drafter.nodes for extent in drafter.extents())
    masked = torch.full((1, 50), float("-inf"))
    masked[0, 3] = 0.0
    assert drafter.extent(masked) == (8, 3)


@pytest.mark.parametrize("fields", [dict(nodes=50, depth=2, width=3), dict(depth=0), dict(width=0), dict(nodes=0)])
def test_extents_without_enough_guesses_are_refused(fields):
    with pytest.raises(ValueError, match="guesses to choose|at least 1"):
        DynamicTreeDrafter(**fields)


def test_entropies_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="sure < unsure, got 3.0 and 2.5"):
        EntropyTreeDrafter(sure=3.0)
