"""Requests that run batched, in turns or in threads get the tokens that each gets alone."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache, partial
from math import inf
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from covering import sampled

from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine, engine_for
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import StrategyError
from specvlm.models.passes import Pass, Routine
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, DraftSession
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.testing import check_drafter
from specvlm.types import DraftTree, GenerationOptions

DRAFTERS = (
    TreeDrafter(),
    TreeDrafter("chain:3"),
    DynamicTreeDrafter(),
    EntropyTreeDrafter(),
    SelfDrafter("chain:3"),
    SparseDrafter(entries=64, length=3),
    PromptLookupDrafter(),
)
VERIFIERS = (GreedyVerifier(), SamplingVerifier(0.8, top_k=20), LooseVerifier(), CoupledVerifier(0.8, top_k=20))
LIMITS, FRAMES = (12, 6, 9, 15), (3, 5, 2, 4)


@cache
def pair(family: str, dtype: str) -> tuple[VideoLM, VideoLM]:
    return tuple(make(family, dtype=getattr(torch, dtype)) for make in (tiny.model, tiny.draft_of))


def graph_of(family, drafter, verifier, dtype="float64", engine=None, seed=0, caches=None) -> DecodingGraph:
    target, draft = pair(family, dtype)
    more = {} if caches is None else {"caches": caches}
    options = GenerationOptions(ratio=0.5, seed=seed)
    return DecodingGraph(target, draft, UniformPruner(), drafter, verifier, options, engine=engine or Engine(), **more)


def request_of(family: str, number: int):
    return tiny.prompt(family, seed=number, frames=FRAMES[number % 4]), LIMITS[number % 4]


EVERY = sampled(tiny.FAMILIES, DRAFTERS, VERIFIERS, ("float64", "float32"), pairs=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "drafter", "verifier", "dtype"), EVERY, ids=lambda choice: str(choice))
def test_four_unlike_requests_joined_have_the_tokens_of_each_alone(family, drafter, verifier, dtype):
    graphs = [graph_of(family, drafter, verifier, dtype, seed=number) for number in range(4)]
    want = [tokens_of(list(graph.decode(*request_of(family, number)))) for number, graph in enumerate(graphs)]
    scheduler = Scheduler(Engine(), stall_s=inf)
    tickets = [scheduler.submit(graph.work(*request_of(family, number))) for number, graph in enumerate(graphs)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == want
    assert scheduler.run <= 0.6 * scheduler.asked


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_requests_of_unlike_drafters_and_rules_are_joined_too(family):
    chosen = [(DRAFTERS[number], VERIFIERS[number % 2]) for number in (0, 2, 4, 6)]
    graphs = [graph_of(family, *strategies, seed=number) for number, strategies in enumerate(chosen)]
    want = [tokens_of(list(graph.decode(*request_of(family, number)))) for number, graph in enumerate(graphs)]
    scheduler, engine = Scheduler(Engine(), stall_s=inf), Engine()
    works = [graph.work(*request_of(family, number)) for number, graph in enumerate(graphs)]
    prompt, limit = request_of(family, 3)
    alone = autoregressive_work(graphs[0].target, prompt, limit, GreedyVerifier(), graphs[0].caches, engine)
    tickets = [scheduler.submit(work) for work in (*works, alone)]
    found = [tokens_of(list(scheduler.steps(ticket))) for ticket in reversed(tickets)][::-1]
    assert found == [*want, tiny.hf_greedy(graphs[0].target, prompt, limit)]


def test_a_request_may_come_and_go_while_others_run():
    graph = graph_of("qwen2_5_vl", TreeDrafter(), GreedyVerifier())
    want = [tokens_of(list(graph.decode(*request_of("qwen2_5_vl", number)))) for number in range(3)]
    scheduler = Scheduler(graph.engine, stall_s=inf)
    first = scheduler.submit(graph.work(*request_of("qwen2_5_vl", 0)))
    steps = scheduler.steps(first)
    begun = [next(steps), next(steps)]
    given_up = scheduler.submit(graph.work(*request_of("qwen2_5_vl", 1)))
    next(scheduler.steps(given_up))  # whose reader is closed at once
    assert given_up.done and len(scheduler.live) == 1
    late = scheduler.submit(graph.work(*request_of("qwen2_5_vl", 2)))
    assert tokens_of(list(scheduler.steps(late))) == want[2]
    assert tokens_of([*begun, *steps]) == want[0]
    assert len(graph.caches._leased) == 0 and len(graph.caches.held) == 4  # the third has those of the second


@dataclass(frozen=True)
class Failing(Drafter):
    """Drafter that fails in the second round. fault: what it yields there."""

    name = "failing"
    model = "draft"
    fault: str = "raises"

    @property
    def max_nodes(self):
        return 2

    def start(self, ctx):
        return FailingSession(self, ctx)


class FailingSession(DraftSession):
    def __init__(self, drafter, ctx):
        self.drafter, self.ctx, self.rounds = drafter, ctx, 0
        self.cache = ctx.caches.take("draft", ctx.draft, 64)

    def propose(self, last):
        self.rounds += 1
        if self.rounds == 2:
            if self.drafter.fault == "raises":
                raise OSError("no")
            cache, tokens, seen, base = self.cache, torch.tensor([5, 6]), None, 0
            while self.drafter.fault == "endless":
                yield Pass(self.ctx.draft, cache, tokens, (0, 1), seen, base, 0)
            if self.drafter.fault == "target":
                cache = self.ctx.cache
            elif self.drafter.fault == "seen":
                seen = torch.ones(2, 5, dtype=torch.bool)
            elif self.drafter.fault == "slots":
                base = 10_000
            elif self.drafter.fault == "tokens":
                tokens = torch.tensor([5.0, 6.0])
            elif self.drafter.fault == "vocabulary":
                tokens = torch.tensor([500, -6])
            elif self.drafter.fault == "depths":
                yield Pass(self.ctx.draft, cache, tokens, (0,), seen, base, 0)
            yield "no pass" if self.drafter.fault == "item" else Pass(self.ctx.draft, cache, tokens, (0, 1), seen, base, 0)
        root = self.ctx.bonus if last is None else last.bonus
        return DraftTree(torch.tensor([root, 5]), (-1, 0))


FAULTS = {
    "raises": "no",
    "target": "a cache that the session did not take",
    "seen": r"must be \(2, 2\)",
    "slots": "its cache has 256",
    "tokens": r"\(Q,\) int64",
    "depths": "2 rows needs 2 depths, got 1",
    "item": "expected a Pass or a call of a Routine",
    "endless": "asks for more than 30 passes in a round",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_drafter_yields_costs_its_own_request_alone(fault, monkeypatch):
    monkeypatch.setattr("specvlm.decoding.proposals.MOST_PASSES", 30)
    family = "qwen2_5_vl"
    good, bad = graph_of(family, TreeDrafter(), GreedyVerifier()), graph_of(family, Failing(fault), GreedyVerifier())
    want = tokens_of(list(good.decode(*request_of(family, 0))))
    scheduler = Scheduler(good.engine, stall_s=inf)
    tickets = [scheduler.submit(graph.work(*request_of(family, 0))) for graph in (good, bad, good)]
    assert tokens_of(list(scheduler.steps(tickets[0]))) == tokens_of(list(scheduler.steps(tickets[2]))) == want
    with pytest.raises(StrategyError, match=FAULTS[fault]) as caught:
        list(scheduler.steps(tickets[1]))
    assert "drafter=failing" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


def test_tokens_that_do_not_exist_are_guessed_about_in_vain():
    prompt, limit = request_of("qwen2_5_vl", 0)
    graph = graph_of("qwen2_5_vl", Failing("vocabulary"), GreedyVerifier())
    assert tokens_of(list(graph.decode(prompt, limit))) == tiny.hf_greedy(graph.target, prompt, limit)


def test_a_failure_in_a_joined_pass_is_tried_apart():
    class Fragile(Engine):
        def run(self, passes):
            if len(passes) > 1:
                raise torch.OutOfMemoryError("too many")
            return super().run(passes)

    graph = graph_of("qwen2_5_vl", TreeDrafter(), GreedyVerifier())
    want = tokens_of(list(graph.decode(*request_of("qwen2_5_vl", 0))))
    scheduler = Scheduler(Fragile(), stall_s=inf)
    tickets = [scheduler.submit(graph.work(*request_of("qwen2_5_vl", 0))) for _ in range(2)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == [want, want]


def test_a_pass_that_fails_frees_its_caches_and_tells_its_owner_alone_even_when_nobody_reads():
    class Picky(Engine):
        def run(self, passes):
            if any(one.tokens_Q.tolist() == [500, -6] for one in passes):
                raise RuntimeError("no such tokens")
            return super().run(passes)

    family = "qwen2_5_vl"
    good, bad = graph_of(family, TreeDrafter(), GreedyVerifier()), graph_of(family, Failing("vocabulary"), GreedyVerifier())
    want = tokens_of(list(good.decode(*request_of(family, 0))))
    scheduler = Scheduler(Picky(), stall_s=inf)
    mine, failing = (scheduler.submit(graph.work(*request_of(family, 0))) for graph in (good, bad))
    assert tokens_of(list(scheduler.steps(mine))) == want
    assert failing.done and not bad.caches._leased
    with pytest.raises(RuntimeError, match="no such tokens"):
        list(scheduler.steps(failing))


def test_an_interrupt_in_a_joined_pass_leaves_the_other_requests_whole():
    class Interrupted(Engine):
        calls = 0

        def run(self, passes):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().run(passes)

    graph = graph_of("qwen2_5_vl", TreeDrafter(), GreedyVerifier())
    want = tokens_of(list(graph.decode(*request_of("qwen2_5_vl", 1))))
    scheduler = Scheduler(Interrupted(), stall_s=inf)
    first, second = (scheduler.submit(graph.work(*request_of("qwen2_5_vl", number))) for number in range(2))
    with pytest.raises(KeyboardInterrupt):
        list(scheduler.steps(first))
    assert tokens_of(list(scheduler.steps(second))) == want and not graph.caches._leased


def test_a_request_that_was_interrupted_does_not_pass_for_an_answer():
    def interrupted(work):
        yield next(work)
        raise KeyboardInterrupt

    graph = graph_of("qwen2_5_vl", PromptLookupDrafter(), GreedyVerifier())
    scheduler = Scheduler(graph.engine, stall_s=inf)
    first, second = (graph.work(*request_of("qwen2_5_vl", number)) for number in range(2))
    tickets = [scheduler.submit(work) for work in (first, interrupted(second))]
    for ticket in tickets:  # the first one's reader met the interrupt, the second one's request ended by it
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.steps(ticket))


@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=lambda engine: engine.name)
def test_where_rows_stand_is_the_word_of_the_pass(engine):
    _, draft = pair("qwen2_5_vl", "float64")
    alone, other = (draft.new_cache(32) for _ in "ab")
    for one in (alone, other):
        draft.prefill(draft.embed_tokens(torch.arange(5, 12)), torch.arange(7).expand(draft.axes, -1), one)
    passes = [Pass(draft, one, torch.tensor([3, 4]), (0, 1), None, 7, 5) for one in (alone, other)]
    (want,), joined = engine.run(passes[:1]), engine.run(passes)
    (shifted,) = engine.run([Pass(draft, alone, torch.tensor([3, 4]), (5, 6), None, 7, 0)])
    for rows in (*joined, shifted):
        assert torch.allclose(rows.hidden_QD, want.hidden_QD, rtol=0, atol=1e-12)


def guessed(count, model, cache, state, *given, fault=""):
    rows, depths, seen = state[1:].expand(count), tuple(range(count)), torch.ones(count, 9) if fault == "seen" else None
    out = yield Pass(model, cache, rows, depths, seen, state[:1], 0)
    return out.logits().argmax(-1) if fault == "result" else (out.logits().argmax(-1),)


ROUTINES = {
    "seen": (r"must be \(2, 2\), got \(2, 9\)", {"work": partial(guessed, 2, fault="seen")}, {}),
    "result": ("a tuple of tensors, got Tensor", {"work": partial(guessed, 2, fault="result")}, {}),
    "wide": ("widest pass has 2 rows yielded one of 3", {"work": partial(guessed, 3)}, {}),
    "closure": (
        "a module-level function or a partial of one",
        {"work": (lambda count: lambda *given: guessed(count, *given))(2)},
        {},
    ),
    "key": ("unhashable", {"key": ([],)}, {}),
    "state": (r"state of 2 ints was called with \(3,\)", {}, {"state": (3,)}),
    "count": (r"with inputs \['\(2,\) torch.float32'\] was called with \[\]", {"inputs": (torch.ones(2),)}, {}),
    "inputs": (r"was called with \['\(1,\)", {"inputs": (torch.ones(2),)}, {"inputs": (torch.ones(1),)}),
}


@dataclass(frozen=True)
class Mistaken(Failing):
    name = "mistaken"
    slot: int = 3

    def start(self, ctx):
        _, made, called = ROUTINES.get(self.fault, ("", {}, {}))
        given = {"work": partial(guessed, 2), "key": ("guessed",), "state": (200, 0), "widest": 2} | made
        cache = ctx.caches.take("draft", ctx.draft, 64)
        routine = Routine(model=ctx.draft, cache=cache, **given)
        call = routine(called.get("state", (self.slot, 5)), *called.get("inputs", ()))

        class Session(DraftSession):
            def propose(self, last):
                yield call
                return DraftTree(torch.tensor([0, 5]), (-1, 0))

        return Session()


@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=lambda engine: engine.name)
@pytest.mark.parametrize("fault", ROUTINES)
def test_what_is_wrong_with_a_routine_is_told_with_its_drafters_name(fault, engine):
    graph = graph_of("qwen2_5_vl", Mistaken(fault), GreedyVerifier(), engine=engine)
    with pytest.raises((StrategyError, TypeError, ValueError)) as caught:
        list(graph.decode(*request_of("qwen2_5_vl", 1)))
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(ROUTINES[fault][0], said) and said.count("drafter=mistaken") == 1 and not graph.caches._leased


@pytest.mark.parametrize("slot", [-7, 10_000])
def test_a_routine_writes_into_its_own_cache_alone(slot):
    """A kernel would write to any slot that it is given."""
    graph = graph_of("qwen2_5_vl", Mistaken(slot=slot), GreedyVerifier(), engine=GraphsEngine("direct"))
    want = tiny.hf_greedy(graph.target, *request_of("qwen2_5_vl", 1))
    assert tokens_of(list(graph.decode(*request_of("qwen2_5_vl", 1)))) == want
    eager = graph_of("qwen2_5_vl", Mistaken(slot=slot), GreedyVerifier())
    with pytest.raises(IndexError, match=f"to slots from {slot} on, its cache has 256"):
        list(eager.decode(*request_of("qwen2_5_vl", 1)))


# ---- a drafter as an outside package writes it -----------------------------------------------------------------------


@cache
def outside() -> type[Drafter]:
    """Load the drafter of docs/write/drafter.md, which imports none of specvlm's drafters and no engine."""
    text = Path(__file__).parents[1].joinpath("docs/write/drafter.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "engine" not in code and "specvlm.strategies.drafters" not in code
    module = ModuleType("specvlm_best_chain")
    sys.modules[module.__name__] = module
    exec(compile(code, "docs/write/drafter.md", "exec"), module.__dict__)
    return module.BestChainDrafter


@pytest.mark.slow
def test_it_keeps_the_contract():
    check_drafter(outside())


@pytest.mark.parametrize("backend", [None, "direct", pytest.param("traced", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_runs_captured_without_a_line_for_it(family, backend):
    if (family, backend) == ("llava_onevision", "traced"):
        pytest.skip("tracing takes long, and the drafter knows no family")
    engine = Engine() if backend is None else GraphsEngine(backend)
    prompt, limit = request_of(family, 3)
    graph = graph_of(family, outside()(), GreedyVerifier(), engine=engine)
    target = graph.target
    assert tokens_of(list(graph.decode(prompt, limit))) == tiny.hf_greedy(target, prompt, limit)
    same = DecodingGraph(
        target, target, UniformPruner(), outside()(), GreedyVerifier(), GenerationOptions(ratio=0.0), engine=engine
    )
    assert all(step.accepted == 4 for step in list(same.decode(prompt, limit))[1:-1])
    if backend:
        assert {key[0] for key in engine._programs} == {"check", "draft"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_one_cuda_graph_on_a_gpu(family):
    from test_engine_gpu import on_gpu

    target, draft = on_gpu(family, torch.float32)
    prompt, limit = request_of(family, 3)
    engine = engine_for("graphs", "cuda")
    steps = [
        list(
            DecodingGraph(
                target, draft, UniformPruner(), outside()(), GreedyVerifier(), GenerationOptions(ratio=0.5), engine=e
            ).decode(prompt, limit)
        )
        for e in (Engine(), engine)
    ]
    assert tokens_of(steps[0]) == tokens_of(steps[1])
    assert {key[0] for key in engine._programs} == {"check", "draft"}
