"""How much requests guess with `drafter.shape=auto`: prices, acceptance, the choice, and answers that it does not change."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import tiny
import torch

from specvlm.decoding import budget
from specvlm.decoding.budget import RETRY, REVIEW, TRIALS, Acceptance, Budget, Round, Running, Share, sharing
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prices import FADES, KEPT, Meter, Prices
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import UserError
from specvlm.models.kv_cache import CachePool
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.shapes import ROOT, shapes_for
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.registry import build
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, GenerationOptions, TreeShape, Verdict
from specvlm.types.chances import best_shape, expected
from specvlm.types.costs import RoundCost, read_costs

PAPER = TreeShape.parse("paper")
EVERY = sorted({*shapes_for(False), *shapes_for(True)}, key=len)


# ---- prices --------------------------------------------------------------------------------------------------------------


def priced(check=(10.0, 0.5, 0.2), draft=(1.0, 2.0, 0.1), counts=(1, 4, 8), shapes=("chain:2", "chain:5", "paper")) -> Prices:
    """Prices of an invented machine: ms of a pass, per request and per row; of a round of drafts, per pass and per row."""
    prices = Prices()
    for requests in counts:
        for shape in map(TreeShape.parse, shapes):
            one = RoundCost.of_shape(shape, requests, 0.0, 0.0)
            check_ms = check[0] + check[1] * requests + check[2] * one.rows
            draft_ms = draft[0] + draft[1] * one.passes + draft[2] * one.draft_rows
            for _ in range(6):
                prices.saw(replace(one, check_ms=check_ms, draft_ms=draft_ms))
    return prices


@pytest.mark.parametrize("requests", [1, 2, 6, 8, 16])
@pytest.mark.parametrize("shape", ["chain:1", "chain:3", "chain:8", "4x2x1"])
def test_rounds_that_were_not_measured_are_predicted(requests, shape):
    one = RoundCost.of_shape(TreeShape.parse(shape), requests, 0.0, 0.0)
    wanted = 10 + 0.5 * requests + 0.2 * one.rows + 1 + 2 * one.passes + 0.1 * one.draft_rows
    assert priced(counts=(1, 4, 8, 16)).round_ms(requests, one.rows, one.passes, one.draft_rows) == pytest.approx(
        wanted, rel=0.05
    )


def test_a_delay_moves_a_time_little_and_fades():
    meter = Meter((1.0, 0.02, 0.02))
    for _ in range(20):
        meter.saw((1, 1, 6), 10.0)
    meter.saw((1, 1, 6), 500.0)
    assert 10 < meter((1, 1, 6)) < 11.1
    assert meter.costs.min() >= 0 and meter.round == 21 and FADES < 1


def test_a_meter_keeps_a_bounded_number_of_sizes_and_never_predicts_less_for_more_rows():
    chance, meter = random.Random(0), Meter((1.0, 0.02, 0.02))
    for rows in range(1, 3 * KEPT):
        meter.saw((1, 1, rows), chance.uniform(1, 100))
    meter.fit()
    assert len(meter.times) == KEPT and (meter.costs >= 0).all()


# ---- acceptance ----------------------------------------------------------------------------------------------------------


def test_acceptance_by_depth_follows_verdicts_and_starts_with_what_is_assumed():
    chain, seen = TreeShape.parse("chain:4"), Acceptance()
    assert seen.chances(2) == [budget.FIRST] * 2
    for _ in range(200):
        seen.saw(DraftTree(torch.zeros(5), chain.parents), (0, 1, 2))  # two accepted, then one refused, the last never tried
    first, second, third, fourth = seen.chances(4)
    assert first > 0.95 and second > 0.95 and third < 0.1 and fourth == third
    assert seen.tokens(chain) == pytest.approx(3, abs=0.3) and seen.tokens(ROOT) == 1
    assert Acceptance(seen).chances(1) == [first]  # a new request expects what others had


def test_a_guess_beside_the_best_counts_as_a_miss_of_the_best():
    tree, seen = DraftTree(torch.zeros(5), (-1, 0, 0, 1, 2)), Acceptance()
    for _ in range(100):
        seen.saw(tree, (0, 2, 4))
    assert seen.chances(2)[0] < 0.1 and seen.chances(2)[1] > 0.9


@pytest.mark.parametrize(("guesses", "depth"), [(1, 1), (6, 3), (12, 4), (25, 5)])
def test_the_best_tree_of_a_size_beats_others_of_its_size(guesses, depth):
    shape = best_shape(guesses, depth, 0.7)
    assert len(shape) == 1 + guesses and shape.depth <= depth
    if guesses == 25:
        assert expected(shape, [0.7] * 5) > expected(PAPER, [0.7] * 5)
    assert expected(TreeShape.parse("chain:3"), [0.5] * 3) == pytest.approx(0.5 + 0.25 + 0.125)


# ---- the choice ----------------------------------------------------------------------------------------------------------


def chosen(prices: Prices, requests: int, chance: float, captured: bool = True, others: int = 0) -> TreeShape:
    """Shape of a round of requests that accept by chance."""
    running = Running()
    own = Budget(running, captured, ())
    own.prices, own.trials = prices, []
    shares = [Share(0, 1, own, 64, decodes=True) for _ in range(requests)]
    prefilling = [Share(0, 1, own, 64) for _ in range(9)]  # they take part in no round yet
    running.shares = dict.fromkeys([*shares, *(Share(0, decodes=True) for _ in range(others)), *prefilling])
    for share in shares:
        share.acceptance.right, share.acceptance.tried = [1e6 * chance] * 8, [1e6] * 8
    found = {share.next_shape() for share in shares}
    assert len(found) == 1
    return found.pop()


H200 = {  # ms by requests: alone, checks of chain 4, chain 8 and 26 rows, a draft pass (gpu.md, part I, pruned)
    1: (17.1, 17.2, 17.5, 18.9, 3.95),
    4: (20.2, 20.8, 23.0, 32.1, 4.09),
    8: (24.8, 26.5, 28.4, 50.8, 4.21),
    16: (31.9, 34.4, 36.5, 88.6, 4.44),
}


def h200() -> Prices:
    prices = Prices()
    for requests, (alone, *checks, draft) in H200.items():
        for shape, ms in zip((ROOT, *map(TreeShape.parse, ("chain:4", "chain:8")), PAPER), (alone, *checks), strict=True):
            for _ in range(4):
                prices.saw(RoundCost.of_shape(shape, requests, draft * shape.depth, ms))
    return prices


def test_trees_narrow_to_chains_as_the_batch_grows():
    found = [chosen(h200(), requests, 0.8) for requests in (1, 4, 8, 16)]
    rows = [len(shape) for shape in found]
    assert rows == sorted(rows, reverse=True) and rows[0] > 6 and rows[-1] <= 7
    assert all(len(shape) == shape.depth + 1 for shape in found[2:])
    assert len(chosen(h200(), 8, 0.5)) < len(chosen(h200(), 8, 0.9))


def test_nothing_is_guessed_where_plain_decoding_is_faster():
    slow = priced(draft=(1.0, 20.0, 0.1))
    assert chosen(slow, 1, 0.6) == ROOT and chosen(priced(), 1, 0.05) == ROOT and chosen(priced(), 1, 0.9) != ROOT
    wide = priced(check=(1.0, 0.5, 5.0))  # a pass that costs its rows: many requests fill it without guesses
    assert chosen(wide, 16, 0.6) == ROOT


def test_rows_of_a_round_are_bounded():
    free = priced(check=(10.0, 0.0, 0.0), draft=(0.1, 0.01, 0.0))
    for requests in (1, 4, 8, 16, 40):
        shape = chosen(free, requests, 0.9)
        assert len(shape) * min(requests, 16) <= budget.ROWS
    assert chosen(free, 16, 0.9).depth == 6


def test_a_request_that_accepts_less_guesses_less_unless_shapes_are_captured():
    for captured in (False, True):
        running = Running()
        own = Budget(running, captured, ())
        own.prices, own.trials = priced(check=(10.0, 0.0, 0.6), draft=(0.5, 0.5, 0.3)), []
        good, bad = (Share(0, 1, own, 64, decodes=True) for _ in range(2))
        running.shares = dict.fromkeys((good, bad))
        for share, chance in ((good, 0.95), (bad, 0.02)):
            share.acceptance.right, share.acceptance.tried = [1e6 * chance] * 8, [1e6] * 8
        shapes = good.next_shape(), bad.next_shape()
        assert (shapes[0] == shapes[1]) is captured and len(shapes[1]) <= len(shapes[0]) and len(shapes[0]) > 2


def test_first_rounds_try_two_depths_and_plain_rounds_try_again():
    running = Running()
    own = Budget(running, True, ())
    share = Share(0, 1, own, 64)
    running.shares = {share: None}
    tree, verdict = DraftTree(torch.zeros(1), (-1,)), Verdict((0,), 1)
    shapes = []
    for _ in range(len(TRIALS) + RETRY + 2 * REVIEW):
        shape = share.next_shape()
        shapes.append(shape)
        tree = DraftTree(torch.zeros(len(shape)), shape.parents)
        share.saw(tree, verdict, {"draft": 0.05 * shape.depth, "verify": 0.01})  # nothing accepted, and dear
    assert shapes[: len(TRIALS)] == [TreeShape.parse(text) for text in reversed(TRIALS)]
    again = [number for number, shape in enumerate(shapes) if shape != ROOT and number >= len(TRIALS)]
    assert len(again) == 1 and again[0] >= RETRY
    assert own.prices.check((1, 1, 5)) == pytest.approx(10, rel=0.1)


def test_a_round_is_measured_by_requests_with_all_levels_and_not_when_something_was_captured():
    deep, flat = TreeShape.parse("chain:4"), TreeShape.parse("chain:1")
    one, other = Share(0), Share(0)
    now = Round(deep, 1.0, 2, (1, 6), shapes={one: deep, other: flat})
    assert now.cost() is None
    now.saw(flat, 0.001, 0.9)
    now.saw(deep, 0.04, 0.02)
    assert now.cost() == RoundCost(3, 5 + 2 + 6, 4, 4 + 1, 40.0, 20.0)


def test_requests_of_an_engine_are_counted_while_they_run():
    engine, target = Engine(), tiny.model("qwen2_5_vl")
    with sharing(engine, target) as plain, sharing(engine, target, drafter=TreeDrafter("chain:3")) as fixed:
        running = budget._RUNNING[engine]
        assert [*running.shares] == [plain, fixed] and (plain.rows, fixed.rows) == (1, 4) and fixed.budget is None
        with pytest.raises(ZeroDivisionError), sharing(engine, target, drafter=TreeDrafter("auto")) as auto:
            assert auto.budget is not None and auto.steady is None
            raise ZeroDivisionError
        assert [*running.shares] == [plain, fixed]
    assert not running.shares
    with sharing(engine, target, drafter=DynamicTreeDrafter()) as grown:
        assert grown.budget is None  # its trees vary, but it does not ask
    assert budget._RUNNING[engine] is running and len(running.pairs) == 1


# ---- decoding ------------------------------------------------------------------------------------------------------------


class Shuffled:
    """Chooses shapes at random, and often none."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def __call__(self, share: Share) -> TreeShape:
        return ROOT if self.chance.random() < 0.4 else self.chance.choice(EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
def test_a_draft_that_is_the_target_guesses_right_whatever_shapes_follow_each_other(family, engine, monkeypatch):
    """So its cache holds the right rows after trees, chains and rounds without guesses."""
    target, shuffled = tiny.model(family), Shuffled(3)
    monkeypatch.setattr(Share, "next_shape", lambda share: shuffled(share))
    graph = DecodingGraph(
        target, target, UniformPruner(), TreeDrafter("auto"), GreedyVerifier(), GenerationOptions(ratio=0.0), engine=engine
    )
    steps = list(graph.decode(tiny.prompt(family), 150))
    assert [step.accepted for step in steps[1:] if step.full] == [step.depth for step in steps[1:] if step.full]
    assert len({step.drafted for step in steps}) > 5


def graph_of(verifier, engine: Engine, drafter=None, family: str = "qwen2_5_vl", noise: float = 0.02) -> DecodingGraph:
    options = GenerationOptions(ratio=0.5, seed=3)
    strategies = UniformPruner(), drafter or TreeDrafter("auto"), verifier
    return DecodingGraph(tiny.model(family), tiny.draft_of(family, noise), *strategies, options, engine=engine)


def together(verifiers, engine: Engine, limit: int = 24, noise: float = 0.02) -> list[tuple[list[int], list[int]]]:
    """Tokens, and guesses by round, of requests that run at the same time."""
    scheduler = Scheduler(engine)
    works = [graph_of(verifier, engine, noise=noise).work(tiny.prompt("qwen2_5_vl"), limit) for verifier in verifiers]
    tickets = [scheduler.submit(work) for work in works]
    with torch.inference_mode():
        while scheduler.live or scheduler.waiting:
            scheduler.turn()
    assert not any(ticket.error for ticket in tickets)
    return [(tokens_of([*ticket.steps]), [step.drafted for step in ticket.steps]) for ticket in tickets]


@pytest.mark.slow
@pytest.mark.parametrize("make", [Engine, lambda: GraphsEngine("direct")], ids=["eager", "graphs"])
def test_an_answer_does_not_depend_on_who_else_is_there(make):
    rules = [GreedyVerifier(), CoupledVerifier(0.8, top_k=20), SamplingVerifier(0.8), LooseVerifier()]
    alone = [together([rule], make())[0] for rule in rules]
    company = together([*rules, *rules, GreedyVerifier()], make())
    assert [tokens for tokens, _ in company[:4]] == [tokens for tokens, _ in alone]
    assert company[2:4] == alone[2:4], "a rule whose answer depends on its guesses has them by its own verdicts alone"
    target = tiny.model("qwen2_5_vl")
    work = autoregressive_work(target, tiny.prompt("qwen2_5_vl"), 24, GreedyVerifier(), CachePool(), Engine())
    scheduler = Scheduler(Engine())
    assert tokens_of(list(scheduler.steps(scheduler.submit(work)))) == alone[0][0]


@pytest.mark.slow
def test_sampled_answers_do_not_follow_the_clock(monkeypatch):
    rule = SamplingVerifier(0.8)
    wanted = together([rule], Engine(), 60, 0.005)  # a good draft, so that shapes change
    chance = random.Random(1)
    monkeypatch.setattr("specvlm.decoding.timing.perf_counter", lambda: chance.uniform(0, 1e6))
    assert together([rule], Engine(), 60, 0.005) == wanted and len(set(wanted[0][1])) > 2


@pytest.mark.slow
def test_few_programs_are_captured():
    engine, graph = GraphsEngine("direct"), None
    for seed in range(3):
        graph = graph_of(GreedyVerifier(), engine)
        list(graph.decode(tiny.prompt("qwen2_5_vl", seed), 40))
    drafts = {key[4:] for key in engine._programs if key[0] == "draft"}
    assert 0 < len(drafts) <= len(shapes_for(True)) - 1
    assert len(shapes_for(True)) <= 6


# ---- the key -------------------------------------------------------------------------------------------------------------


def test_costs_of_a_profile_are_where_auto_starts(tmp_path):
    path = tmp_path / "costs.json"
    timing = {"drafter": "tree", "shape": "chain:3", "ratio": 0.9, "context": 200, "draft_ms": 6.0, "check_ms": 11.0}
    shared = {"requests": 8, "rows": 40, "passes": 4, "draft_rows": 32, "draft_ms": 17.0, "check_ms": 26.0, "ratio": 0.9}
    others = [timing | {"drafter": "self"}, timing | {"ratio": 0.0, "draft_ms": 9.0}, timing | {"ratio": 1.0}]
    both = [shared, shared | {"ratio": 0.0}]  # another ratio takes another time
    path.write_text(json.dumps({"alone_ms": 10.0, "timings": [timing, *others], "shared": both}))
    wanted = (RoundCost(1, 1, 0, 0, 0.0, 10.0), RoundCost(1, 4, 3, 3, 6.0, 11.0, 0.9), RoundCost(**shared))
    assert read_costs(path, "tree") == wanted
    assert read_costs(path, "self") == wanted[:2]  # `shared` was measured with the draft model
    drafter = TreeDrafter("auto", costs=str(path))
    with sharing(Engine(), tiny.model("qwen2_5_vl"), drafter=drafter) as share:
        assert not share.budget.trials and share.budget.prices.check((1, 1, 1)) == pytest.approx(10, rel=0.1)
    for text in ("{}", "no", json.dumps({"alone_ms": 10.0, "timings": [timing | {"shape": "none"}]})):
        path.write_text(text)
        with pytest.raises((ValueError, UserError)):
            TreeDrafter("auto", costs=str(path))
    with pytest.raises(ValueError, match="costs is for shape=auto"):
        TreeDrafter("chain:3", costs=str(path))
    with pytest.raises((ValueError, UserError), match="missing"):
        build("drafter", {"name": "tree", "shape": "auto", "costs": str(tmp_path / "missing.json")})


def test_auto_reserves_room_for_its_largest_tree():
    for drafter in (TreeDrafter("auto"), SelfDrafter("auto")):
        assert drafter.max_nodes == max(map(len, EVERY)) == 26 and drafter.fixed is None and drafter.adapts
    assert not TreeDrafter().adapts and TreeDrafter().fixed == PAPER
