"""Drafting while the target checks: the same trees and answers as without, whatever comes true and however far it got."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import joined_ops
import pytest
import tiny
import torch
from covering import sampled

from specvlm.decoding.loop import DecodingGraph, generator_for
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine
from specvlm.engine.base import Submitted
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.steps import Check
from specvlm.errors import UserError
from specvlm.results.metrics import tokens_of
from specvlm.strategies import DraftContext, Sampling
from specvlm.strategies.drafters import ahead, overlap
from specvlm.strategies.drafters.ahead import outcomes_of, plan_of
from specvlm.strategies.drafters.overlap import OverlapDrafter, Pace
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, TreeShape, Verdict

ALL = 129  # passes ahead, more than any shape has
SHAPES = ("chain:1", "chain:5", "3x2x1", "paper", "[[0],[2],[2,1]]")
VERIFIERS = (GreedyVerifier(), SamplingVerifier(0.8, top_k=20), CoupledVerifier(0.8, top_k=20), LooseVerifier())
BACKENDS = (None, "direct", "traced")
FEW = 0.3  # noise of a draft whose guesses are often wrong, so that many outcomes come true


def engine_of(backend: str | None) -> Engine:
    return Engine() if backend is None else GraphsEngine(backend)


@cache
def pair(family: str):
    return tiny.model(family, dtype=torch.float32), tiny.draft_of(family, dtype=torch.float32)


def graph_of(family, drafter, verifier=VERIFIERS[0], engine=None, seed=3) -> DecodingGraph:
    options = GenerationOptions(ratio=0.5, seed=seed)
    return DecodingGraph(*pair(family), UniformPruner(), drafter, verifier, options, engine=engine or Engine())


def rounds_of(steps) -> list[tuple[list[int], tuple[int, ...], int]]:
    return [(step.tree.tokens.tolist(), step.verdict.path, step.verdict.bonus) for step in steps if step.tree is not None]


def hits(steps) -> list[int]:
    return [step.ahead for step in steps if step.ahead is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shape", "verifier", "backend", "passes"),
    sampled(tiny.FAMILIES, SHAPES, VERIFIERS, BACKENDS, (1, 2, ALL), pairs=True),
    ids=lambda choice: str(choice),
)
def test_every_round_is_that_of_the_drafter_without_overlap(family, shape, verifier, backend, passes):
    engine = engine_of(backend)
    want = list(graph_of(family, TreeDrafter(shape), verifier, engine).decode(tiny.prompt(family), 40))
    found = list(graph_of(family, OverlapDrafter(shape, ahead=passes), verifier, engine).decode(tiny.prompt(family), 40))
    assert rounds_of(found) == rounds_of(want) and tokens_of(found) == tokens_of(want)
    depth = TreeShape.parse(shape).depth
    assert len(hits(found)) == len(found) - 2 and all(0 <= levels <= min(passes, depth) for levels in hits(found))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", ["chain:3", "2x2"])
def test_most_rounds_of_a_good_draft_are_hits(family, shape):
    """The draft is the target, which sees everything: all is accepted, and the correction is its own first one."""
    target, _ = pair(family)
    options, drafter = GenerationOptions(ratio=0.0), OverlapDrafter(shape, ahead=ALL)
    steps = list(
        DecodingGraph(target, target, UniformPruner(), drafter, GreedyVerifier(), options).decode(tiny.prompt(family), 30)
    )
    assert set(hits(steps)) == {TreeShape.parse(shape).depth} and len(hits(steps)) >= 5


def session_of(family: str, drafter: OverlapDrafter | TreeDrafter, rule: Sampling | None = None):
    target, draft = pair(family)
    prompt, generator = tiny.prompt(family), generator_for(5)
    graph = graph_of(family, drafter)
    keep = graph.select(prompt, None, target.features(prompt), generator)
    more = (rule or Sampling(), generator)
    return drafter.start(DraftContext(prompt, keep, 11, target, draft, None, "original", 60, graph.vocabulary, *more))


@torch.inference_mode()
def played(family: str, shape: str, rounds: int, seed: int, passes: int = ALL):
    """Run rounds of chosen outcomes. Returns the levels ahead of each, and its tree with and without guessing on."""
    chance, engine = torch.Generator().manual_seed(seed), Engine()
    mine, plain = (session_of(family, OverlapDrafter(shape, ahead=passes)) for _ in range(2))
    found, last = [], None
    for _ in range(rounds):
        both = []
        for session in (mine, plain):
            tree = engine.finish(session.propose(last))
            rows = session.root + sum(map(len, session.shape.levels))
            both.append((tree.tokens.tolist(), session.others.tolist(), session.cache.keys[:, :, :, :rows].clone()))
        found.append((mine.drafted_ahead, *both))
        engine.finish(mine.guess_on(lambda: False))
        number = int(torch.randint(len(mine.plan.outcomes) + 2, (), generator=chance))
        if number < len(mine.plan.outcomes):
            (node, _), bonus = mine.plan.outcomes[number], mine.bonuses.read()[number]
        else:  # a token that is no correction
            node = int(torch.randint(len(mine.shape), (), generator=chance))
            known = {*mine.bonuses.read(), *tree.tokens.tolist()}
            bonus = next(token for token in range(5, 90) if token not in known)
        last = Verdict(tree.way_to(node), bonus)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("shape", "passes"), [("chain:3", ALL), ("3x2x1", ALL), ("[[0],[2],[2,1]]", 2)])
def test_any_outcome_leaves_the_drafts_cache_as_if_drafted_afresh(family, shape, passes):
    found = played(family, shape, 14, seed=1, passes=passes)
    assert sum(levels or 0 for levels, *_ in found) >= 6
    for _, (*tokens, keys), (*want, right) in found:  # the tree, and the corrections after each of its nodes
        assert tokens == want
        torch.testing.assert_close(keys, right, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Moved:
    """A planted fault: the rows of another outcome are moved, or the tokens of another one are taken."""

    table: str

    def __call__(self, *shape):
        plan = ahead._Planner(*shape[:3]).plan(shape[3])
        setter = object.__setattr__
        setter(plan, self.table, getattr(plan, self.table).roll(1, 0))
        return plan


@pytest.mark.slow
@pytest.mark.parametrize("table", ["ways_OD", "tokens_OM", "more_OEX", "bonus_O"])
def test_a_planted_fault_is_seen_although_no_output_shows_it(table, monkeypatch):
    monkeypatch.setattr(overlap, "plan_of", Moved(table))
    with pytest.raises(AssertionError):
        test_any_outcome_leaves_the_drafts_cache_as_if_drafted_afresh("qwen2_5_vl", "3x2x1", ALL)
    monkeypatch.setattr(OverlapDrafter, "max_rows", TreeDrafter.max_rows)
    graph = graph_of("qwen2_5_vl", OverlapDrafter("3x2x1", ahead=ALL))
    prompt = tiny.prompt("qwen2_5_vl")
    assert tokens_of(list(graph.decode(prompt, 20))) == tiny.hf_greedy(graph.target, prompt, 20)


# --- outcomes and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("corrections", [1, 2, 3])
def test_a_chain_has_all_outcomes(length, corrections):
    found = outcomes_of(TreeShape.parse(f"chain:{length}"), corrections)
    assert sorted(found) == [(node, number) for node in range(length + 1) for number in range(corrections)]


@pytest.mark.parametrize("shape", ["paper", "chain:30", "8x4x2", "64"])
def test_no_pass_is_wider_than_engines_capture(shape):
    plan = plan_of(TreeShape.parse(shape), 2, False, torch.device("cpu"))
    assert max(len(piece.feed_Q) for piece in plan.pieces) <= ahead.WIDEST
    assert plan.outcomes and plan.rows == plan.pieces[-1].at + len(plan.pieces[-1].feed_Q)


# --- when it runs -----------------------------------------------------------------------------------------------------


def test_without_a_device_of_its_own_the_draft_does_not_guess_on():
    steps = list(graph_of("qwen2_5_vl", OverlapDrafter("chain:3")).decode(tiny.prompt("qwen2_5_vl"), 12))
    assert all(step.ahead is None for step in steps)


def fitting(session, passes: int):
    """Let a session guess on as on a device of its own; the verdict comes after so many passes. Returns their number."""
    session.pieces, session.fitting, ran = [*map(session._piece, range(len(session.plan.pieces)))], True, Counted()
    work = session.guess_on(lambda: ran.passes >= passes)
    if work is None:
        return None
    ran.finish(work)
    return ran.passes


class Counted(Engine):
    passes = 0

    def run(self, passes):
        self.passes += len(passes)
        return super().run(passes)


@torch.inference_mode()
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_guessing_on_stops_as_soon_as_the_verdict_is_there(passes):
    session = session_of("qwen2_5_vl", OverlapDrafter("chain:4"))
    Engine().finish(session.propose(None))
    assert fitting(session, passes) == passes and session.passes == passes


class Device:
    """A draft device and a target device in simulated time."""

    def __init__(self, check_s: float, pass_s: float) -> None:
        self.check_s, self.pass_s, self.now, self.drafted = check_s, pass_s, 0.0, 0

    def round(self, pace: Pace, passes: int, hit: bool) -> float:
        """Run a round of a tree of `passes` levels, none of whose outcomes follows a leaf. Returns how long it takes."""
        pace.begin(self.drafted)
        start, ends = self.now, list[float]()
        while len(ends) < passes and self.now < start + self.check_s:
            running = sum(end > self.now for end in ends)
            if pace.starts(running):
                ends.append(max([self.now, *ends]) + self.pass_s)
            self.now += self.check_s / 1000
        pace.end(len(ends), sum(end <= self.now for end in ends), self.now >= start + self.check_s)
        self.now = max(self.now, start + self.check_s)
        pace.went(hit)
        self.drafted = passes - len(ends) if hit else passes
        self.now = max([self.now, *ends]) + self.pass_s * self.drafted
        return self.now - start


@pytest.mark.parametrize("pass_s", [0.5, 2.9, 4.1, 17.0, 19.0, 40.0, 200.0])
@pytest.mark.parametrize("hits", [0.0, 0.3, 0.75, 1.0])
def test_guessing_on_saves_time_where_it_can_and_costs_next_to_none_where_not(pass_s, hits, monkeypatch):
    device, passes, chance = Device(18.0, pass_s), 5, torch.Generator().manual_seed(0)
    monkeypatch.setattr(overlap, "perf_counter", lambda: device.now)
    pace, rounds = Pace(), 60
    taken = sum(device.round(pace, passes, float(torch.rand((), generator=chance)) < hits) for _ in range(rounds))
    without = rounds * (18.0 + passes * pass_s)
    assert taken <= 1.03 * without
    if hits == 1.0:  # all that fits is hidden
        assert taken <= 1.03 * rounds * max(18.0 + passes * pass_s - 18.0, 18.0) + 2 * pass_s


def test_a_pass_starts_early_only_where_it_ends_before_the_check(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(overlap, "perf_counter", lambda: now[0])
    pace = Pace()
    assert pace.starts(0) and not pace.starts(1)  # nothing is known yet
    now[0] = 10.0
    pace.end(4, 4, True)  # passes of 2.5 s, a check of 10 s
    pace.begin(0)
    for seconds, waiting, starts in [(4.9, 1, True), (5.1, 1, False), (2.4, 2, True), (2.6, 2, False), (7.4, 0, True)]:
        now[0] = pace.begun + seconds
        assert pace.starts(waiting) == starts
    now[0] = pace.begun + 9.0  # 1 s left: saves 1 s after a hit, costs 1.5 s after a miss
    pace.hits = 0.61
    assert pace.starts(0) and not pace.starts(1)
    pace.hits = 0.59
    assert not pace.starts(0)


@pytest.mark.slow
@pytest.mark.parametrize("verifier", VERIFIERS[:3], ids=str)
@pytest.mark.parametrize("shape", ["chain:4", "3x2x1"])
def test_rounds_do_not_depend_on_when_verdicts_come(shape, verifier, monkeypatch):
    """As on a device of its own; checks are over at random times."""
    chance, real = torch.Generator().manual_seed(1), overlap.OverlapSession.__init__
    took, propose = set(), overlap.OverlapSession.propose

    def noted(self, last):
        took.add(self.passes)
        return propose(self, last)

    def apart(self, *given):
        real(self, *given)
        self.pieces, self.fitting = [*map(self._piece, range(len(self.plan.pieces)))], True

    want = list(graph_of("qwen2_5_vl", TreeDrafter(shape), verifier).decode(tiny.prompt("qwen2_5_vl"), 40))
    monkeypatch.setattr(overlap.OverlapSession, "__init__", apart)
    monkeypatch.setattr(overlap.OverlapSession, "propose", noted)
    monkeypatch.setattr(Pace, "starts", lambda self, waiting: not waiting)
    monkeypatch.setattr(Submitted, "done", property(lambda self: float(torch.rand((), generator=chance)) < 0.2))
    found = list(graph_of("qwen2_5_vl", OverlapDrafter(shape), verifier).decode(tiny.prompt("qwen2_5_vl"), 40))
    assert rounds_of(found) == rounds_of(want) and len(took) > 3


# --- submitted checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["direct", pytest.param("traced", marks=pytest.mark.slow)])
def test_a_submitted_check_is_started_at_once_and_read_later(backend, monkeypatch):
    started = []
    real = GraphsEngine._run_check

    def run(self, lean, check: Check):
        found = real(self, lean, check)
        started.append((check.waits, check.decided is not None, found is not None))
        return found

    monkeypatch.setattr(GraphsEngine, "_run_check", run)
    graph = graph_of("qwen2_5_vl", OverlapDrafter("chain:2", ahead=1), engine=GraphsEngine(backend))
    steps = list(graph.decode(tiny.prompt("qwen2_5_vl"), 8))
    assert started == [(False, True, False), (True, True, True)] * (len(steps) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("backend", [None, "direct", "joined"])
def test_several_requests_have_the_tokens_of_each_alone(family, backend, monkeypatch):
    if backend == "joined":  # checks and drafts of several requests in one pass
        joined_ops.install(monkeypatch)
        backend = "direct"
    drafters = [OverlapDrafter("chain:3", ahead=ALL), OverlapDrafter("2x2", ahead=2), TreeDrafter("chain:3")]
    graphs = [graph_of(family, drafter, engine=engine_of(backend), seed=n) for n, drafter in enumerate(drafters)]
    prompts = [tiny.prompt(family, seed=number) for number in range(3)]
    want = [tokens_of(list(graph.decode(prompt, 14))) for graph, prompt in zip(graphs, prompts, strict=True)]
    scheduler = Scheduler(engine_of(backend))
    tickets = [scheduler.submit(graph.work(prompt, 14)) for graph, prompt in zip(graphs, prompts, strict=True)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == want


def broken(*_):
    raise RuntimeError("the draft is gone")


def test_a_draft_that_dies_while_the_target_checks_ends_the_request(monkeypatch):
    monkeypatch.setattr(overlap, "guess", broken)
    graph = graph_of("qwen2_5_vl", OverlapDrafter("chain:2", ahead=1))
    with pytest.raises(RuntimeError, match="the draft is gone") as told:
        list(graph.decode(tiny.prompt("qwen2_5_vl"), 8))
    assert "in drafter=overlap" in told.value.__notes__ and not graph.caches._leased


def test_too_few_tokens_are_told_in_one_line():
    with pytest.raises(UserError, match="needs 11 guesses per node, there are 7 tokens"):
        graph = graph_of("qwen2_5_vl", OverlapDrafter("5x1", corrections=6))
        object.__setattr__(graph, "vocabulary", 7)
        list(graph.decode(tiny.prompt("qwen2_5_vl"), 8))
