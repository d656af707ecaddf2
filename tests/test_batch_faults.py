"""Joined passes on a CPU (see `joined_ops`): a request's answer is its own, whatever the others do, and however they fail."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from math import inf
from threading import Thread
from time import sleep
from weakref import ref

import joined_ops
import pytest
import torch
from test_passes import DRAFTERS, graph_of, request_of

from specvlm.decoding.loop import autoregressive_work
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import cuda_graphs
from specvlm.engine.batch import Batch
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.program import Program
from specvlm.errors import StrategyError
from specvlm.models.passes import Pass, Routine
from specvlm.process.memo import restored
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Drafter, DraftSession
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, ancestor_mask

FAMILY = "qwen2_5_vl"
RULES = [GreedyVerifier(), SamplingVerifier(0.8, top_k=20), CoupledVerifier(0.8, top_k=20)]


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    joined_ops.install(monkeypatch)


def together(engine, graphs, scheduler=None):
    """Run a request of each graph on one scheduler. Returns their answers; of those that fail, the error."""
    scheduler, found = scheduler or Scheduler(engine, stall_s=inf), []
    tickets = [scheduler.submit(graph.work(*request_of(FAMILY, number))) for number, graph in enumerate(graphs)]
    for ticket in tickets:
        try:
            found.append(tokens_of(list(scheduler.steps(ticket))))
        except Exception as error:
            found.append(error)
    return found


def alone(graphs):
    return [tokens_of(list(graph.decode(*request_of(FAMILY, number)))) for number, graph in enumerate(graphs)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_unlike_requests_answer_as_alone(family):
    engine = GraphsEngine("direct")
    graphs = [graph_of(family, one, RULES[n % 3], engine=engine, seed=n) for n, one in enumerate((*DRAFTERS, *DRAFTERS[:2]))]
    want = [tokens_of(list(graph.decode(*request_of(family, number)))) for number, graph in enumerate(graphs)]
    scheduler, target = Scheduler(engine, stall_s=inf), graphs[0].target
    works = [graph.work(*request_of(family, number)) for number, graph in enumerate(graphs)]
    plain = autoregressive_work(target, *request_of(family, 3), RULES[0], graphs[0].caches, engine)
    tickets = [scheduler.submit(work) for work in (*works, plain)]
    *found, last = [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets]
    assert found == want and last == tokens_of(list(graph_of(family, DRAFTERS[0], RULES[0]).decode(*request_of(family, 3))))
    assert scheduler.run < 0.5 * scheduler.asked and any(key[0] == "batch" for key in engine._programs)


@pytest.mark.parametrize("drafter", [TreeDrafter("chain:3"), SelfDrafter("2x2")], ids=lambda drafter: drafter.name)
def test_equal_drafts_are_one_program(drafter):
    engine = GraphsEngine("direct")
    graphs = [graph_of(FAMILY, drafter, RULES[2 * (n % 2)], engine=engine, seed=n) for n in range(4)]
    graphs = [graph_of(FAMILY, drafter, RULES[0], engine=engine) for _ in graphs] if drafter.name == "tree" else graphs
    assert together(engine, graphs) == alone(graphs)
    assert any(key[0] in ("drafts", "batch") for key in engine._programs)


# ---- failures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(GreedyVerifier):
    """Greedy rule whose decision is malformed from the third tree on. fault: how."""

    name = "wrong"
    fault: str = "long"

    def decide(self, ctx):
        found = super().decide(ctx)
        COUNT["decided"] = COUNT.get("decided", 0) + 1
        if COUNT["decided"] < 3:
            return found
        if self.fault == "raises":
            raise ValueError("no rule")
        return torch.cat([found, found[:1]]) if self.fault == "long" else found.float()


COUNT: dict[str, int] = {}


@pytest.mark.parametrize("fault", ["raises", "long", "float"])
@pytest.mark.parametrize("place", [0, 2])
def test_what_a_verifier_returns_costs_its_own_request_alone(fault, place):
    COUNT.clear()
    engine = GraphsEngine("direct")
    graphs = [graph_of(FAMILY, DRAFTERS[0], GreedyVerifier(), engine=engine) for _ in range(3)]
    want = alone(graphs)
    graphs[place] = graph_of(FAMILY, DRAFTERS[0], Wrong(fault), engine=engine)
    found = together(engine, graphs)
    assert [one for n, one in enumerate(found) if n != place] == [one for n, one in enumerate(want) if n != place]
    assert isinstance(found[place], (StrategyError, ValueError))


def counted_moves(monkeypatch):
    """Record every compaction of a draft's cache: the cache, and the slot of the root."""
    from specvlm.models.kv_cache import KVCache

    moved, move = [], KVCache.move

    def counting(self, base_1, path_D):
        moved.append((id(self), base_1.tolist()[0]))
        move(self, base_1, path_D)

    monkeypatch.setattr(KVCache, "move", counting)
    return moved


@pytest.mark.parametrize("which", ["verifier", "pass", "routine"])
def test_a_draft_runs_once_whatever_fails_beside_it(which, monkeypatch):
    """It compacts its cache, which must not happen twice."""
    COUNT.clear()
    engine, moved = GraphsEngine("direct"), counted_moves(monkeypatch)
    graphs = [graph_of(FAMILY, SelfDrafter(shape), GreedyVerifier(), engine=engine) for shape in ("2x2", "3x1")]
    want = alone(graphs)
    moved.clear()
    if which == "verifier":  # of a request without a draft, whose checks run beside the others' drafts
        graphs.append(graph_of(FAMILY, DRAFTERS[-1], Wrong("raises"), engine=engine))
    elif which == "routine":
        graphs.append(graph_of(FAMILY, Keeping("raises", "target"), GreedyVerifier(), engine=engine))
    else:
        graphs.append(graph_of(FAMILY, SelfDrafter("chain:3"), GreedyVerifier(), engine=engine))  # not captured as a whole
        fail_once(monkeypatch)
    found = together(engine, graphs)
    assert found[:2] == want
    moved = [(cache, slot) for cache, slot in moved if slot != 5]  # those of the routine that fails
    assert moved and len(moved) == len(set(moved))


def fail_once(monkeypatch, at=6):
    """Let one call of a joined pass's program fail once it has its first inputs."""
    call, count = Program.__call__, [0]

    def failing(self, *values):
        if len(values) == 8:  # of a joined pass: tokens, numbers and tables
            count[0] += 1
            if count[0] == at:
                for buffer, value in zip(self.inputs[:4], values[:4], strict=True):
                    buffer.copy_(torch.as_tensor(value) if value is not None else buffer)
                raise torch.OutOfMemoryError("no memory")
        return call(self, *values)

    monkeypatch.setattr(Program, "__call__", failing)
    return count


@pytest.mark.parametrize("at", range(1, 9))
def test_a_joined_pass_that_fails_leaves_no_stale_tables(at, monkeypatch):
    engine = GraphsEngine("direct")
    trees = [TreeDrafter("chain:3"), TreeDrafter("[[0],[1],[0,0]]")]  # of one size: their passes share programs
    graphs = [graph_of(FAMILY, trees[n % 2], GreedyVerifier(), engine=engine) for n in range(3)]
    want = alone(graphs)
    count = fail_once(monkeypatch, at)
    assert together(engine, graphs) == want == together(engine, graphs)
    assert count[0] > at


def test_what_cannot_be_captured_is_told_once_and_not_tried_again(monkeypatch, caplog):
    engine, tried = GraphsEngine("direct"), []
    graphs = [graph_of(FAMILY, DRAFTERS[0], GreedyVerifier(), engine=engine) for _ in range(3)]
    want, capture = alone(graphs), engine.capture

    def failing(fn, inputs, *given):
        if fn.func.__name__ in ("_side_by_side", "_with_best"):
            tried.append(len(inputs))
            raise torch.OutOfMemoryError("no memory")
        return capture(fn, inputs, *given)

    monkeypatch.setattr(engine, "capture", failing)
    with caplog.at_level(logging.WARNING):
        assert together(engine, graphs) == want
    shapes = len(tried)
    said = [one.getMessage() for one in caplog.records]
    assert len(said) == 3 and len(set(said)) == 2  # of the draft model's drafts, and of both models' passes
    assert shapes < 16
    assert together(engine, graphs) == want and len(tried) == shapes


# ---- plugins ---------------------------------------------------------------------------------------------------------


def kept_rows(fault, model, cache, state, *given):
    """Guess two tokens by two passes, whose rows are read when both have run."""
    first = yield Pass(model, cache, state[1:2], (0,), None, state[:1], 0)
    if fault == "far":
        yield Pass(model, cache, state[1:2], (0,), None, state[:1], 0, at=400)
    second = yield Pass(model, cache, state[1:2] + 1, (0,), None, state[:1] + 1, 0)
    if fault == "raises":
        cache.move(state[:1], torch.arange(2))
        SEEN.append("raised")
        raise ValueError("no guess")
    found = torch.stack([rows.logits().argmax(-1)[0] for rows in (first, second)])
    return (found,)


SEEN: list[object] = []


@dataclass(frozen=True)
class Keeping(Drafter):
    """A plugin's drafter of a chain of two."""

    name = "keeping"
    fault: str = ""
    model: str = "draft"
    slots: int = 64

    @property
    def max_nodes(self):
        return 3

    def start(self, ctx):
        return KeepingSession(self, ctx)


class KeepingSession(DraftSession):
    def __init__(self, drafter, ctx):
        from functools import partial

        self.ctx, model = ctx, ctx.target if drafter.model == "target" else ctx.draft
        self.drafter, self.cache = drafter, ctx.caches.take("draft", model, drafter.slots)
        work = partial(kept_rows, drafter.fault)
        self.routine = Routine(work, ("kept", drafter.fault), model, self.cache, 1, (9, 0))

    def propose(self, last):
        root = self.ctx.bonus if last is None else last.bonus
        (guesses,) = yield self.routine((5, root))
        SEEN.append(guesses.tolist())
        return DraftTree(torch.cat([torch.tensor([root]), guesses]), (-1, 0, 1))


def test_rows_that_a_plugin_keeps_are_not_overwritten_by_the_next_pass():
    engine = GraphsEngine("direct")
    graphs = [
        graph_of(FAMILY, Keeping(), GreedyVerifier(), engine=engine),
        graph_of(FAMILY, Keeping("x"), GreedyVerifier(), engine=engine),
    ]
    SEEN.clear()
    want, guesses = alone(graphs), sorted(map(str, SEEN))
    SEEN.clear()
    assert together(engine, graphs) == want
    assert sorted(map(str, SEEN)) == guesses


def test_a_pass_beyond_a_plugins_own_cache_is_refused_as_alone():
    """The joined program serves caches of up to its largest capacity; one of them is smaller."""
    engine = GraphsEngine("direct")
    graphs = [graph_of(FAMILY, Keeping("far", slots=slots), GreedyVerifier(), engine=engine) for slots in (1024, 64, 1024)]
    found = together(engine, graphs)
    with pytest.raises(StrategyError, match="exceeds its 256 slots"):
        alone(graphs[1:2])
    graphs[1] = graphs[0]
    assert isinstance(found[1], StrategyError) and found[::2] == alone(graphs)[::2]


def test_a_program_of_ours_does_not_serve_a_plugin():
    """A plugin's slots are clamped to its cache, ours are not."""
    from specvlm.strategies.drafters.tree import TreeSession

    class Foreign(TreeSession):
        pass

    @dataclass(frozen=True)
    class ForeignDrafter(TreeDrafter):
        def start(self, ctx):
            session = super().start(ctx)
            session.__class__ = Foreign
            return session

    engine = GraphsEngine("direct")
    for drafter in (TreeDrafter("chain:3"), ForeignDrafter("chain:3")):
        graphs = [graph_of(FAMILY, drafter, GreedyVerifier(), engine=engine) for _ in range(3)]
        assert together(engine, graphs) == alone(graphs)
        found = {key for key in engine._programs if key[0] == "drafts"}
    assert len({key for key in found if True in key}) < len(found)


def test_a_mask_that_a_plugin_has_changed_does_not_stay_changed():
    engine, shape = GraphsEngine("direct"), TreeDrafter("2x1")
    graphs = [graph_of(FAMILY, shape, GreedyVerifier(), engine=engine) for _ in range(2)]
    want = alone(graphs)
    with torch.inference_mode():
        ancestor_mask(shape.fixed.parents).fill_(True)
    try:
        together(engine, graphs)
    finally:
        assert restored()
    assert together(engine, graphs) == want


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_program_keeps_what_its_routine_reads():
    engine = GraphsEngine("direct")
    graphs = [graph_of(FAMILY, TreeDrafter("chain:3"), GreedyVerifier(), engine=engine) for _ in range(3)]
    together(engine, graphs)
    programs = [program for key, (_, program) in engine._programs.items() if key[0] == "drafts"]
    assert programs and all("expand" in repr(program.tables) for program in programs)


def test_programs_beyond_the_limit_are_not_kept(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 1)
    made, init = [], Program.__init__

    def counted(self, *args, **named):
        init(self, *args, **named)
        made.append(ref(self))

    monkeypatch.setattr(Program, "__init__", counted)
    engine = GraphsEngine("direct")
    graphs = [graph_of(FAMILY, one, GreedyVerifier(), engine=engine) for one in DRAFTERS]
    together(engine, graphs)
    gc.collect()
    kept = {id(program) for _, program in engine._programs.values()}
    assert {id(one()) for one in made if one() is not None} <= kept


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_with_schedulers_of_their_own_share_an_engine(monkeypatch):
    """Each thread rests between a joined pass and its results, which another thread's pass would overwrite."""
    split = Batch.split
    monkeypatch.setattr(Batch, "split", lambda *given: (sleep(0.002), split(*given))[1])
    engine, found = GraphsEngine("direct"), dict[int, object]()
    shapes = ("chain:3", "2x1", "chain:3")
    graphs = [graph_of(FAMILY, TreeDrafter(shape), GreedyVerifier(), engine=engine) for shape in shapes]
    each = graphs[:2], graphs[1:]
    want = [*map(alone, each)]
    threads = [Thread(target=lambda n=n: found.update({n: together(engine, each[n])})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: want[0], 1: want[1]}
