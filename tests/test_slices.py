"""Prefills run in slices between the steps of requests that decode, which wait no longer than they are told to."""

from __future__ import annotations

from itertools import count

import pytest
import tiny
import torch
from test_passes import graph_of

from specvlm.decoding.scheduler import Scheduler
from specvlm.decoding.shared import SharedScheduler
from specvlm.engine import Engine
from specvlm.models.pauses import Pause
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import Step

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch):
    """Count time in calls: each part of a prefill takes one second."""
    now = count()
    monkeypatch.setattr("specvlm.decoding.slices.perf_counter", lambda: next(now))


def prefilling(name, parts, log, waits=False):
    for _ in range(parts):
        log.append(name)
        yield Pause(CPU, waits)
    yield Step((1,))


def decoding(steps, log):
    for _ in range(steps):
        log.append("step")
        yield Step((2,))


def finish(scheduler):
    for _ in range(200):
        scheduler.turn()
        if not scheduler.live and not scheduler.waiting:
            return
    raise AssertionError("a request does not end")


def runs_of(log, name):
    """Lengths of the runs of `name` between steps."""
    return [len(part) for part in "".join("x" if one == name else "|" for one in log).split("|") if part]


@pytest.mark.parametrize("stall", [0, 1, 3, 1000])
def test_parts_of_a_prefill_between_two_steps_take_no_longer_than_the_bound(stall, ticks):
    log, scheduler = [], Scheduler(Engine(), stall_s=stall)
    running = scheduler.submit(decoding(40, log))
    scheduler.turn()
    late = scheduler.submit(prefilling("part", 12, log))
    finish(scheduler)
    assert len(running.steps) == 40 and len(late.steps) == 1 and log.count("part") == 12
    # The first part of a prefill comes with the start of the request.
    assert max(runs_of(log, "part")) <= 1 + max(1, stall) and sum(runs_of(log, "part")) == 12


def test_prefills_run_in_the_order_in_which_they_came(ticks):
    log, scheduler = [], Scheduler(Engine(), stall_s=1)
    scheduler.submit(decoding(60, log))
    scheduler.turn()
    for name in "ab":
        scheduler.submit(prefilling(name, 8, log))
    finish(scheduler)
    parts = [one for one in log if one != "step"]
    assert parts[:2] == ["a", "b"] and parts[2:] == ["a"] * 7 + ["b"] * 7


def test_a_prefill_that_waits_for_another_leaves_the_time_to_it(ticks):
    log, scheduler = [], Scheduler(Engine(), stall_s=1)
    scheduler.submit(prefilling("waits", 3, log, waits=True))
    scheduler.submit(prefilling("a", 5, log))
    finish(scheduler)
    assert log[:4] == ["waits", "a", "waits", "a"] and log.count("a") == 5


def test_a_lone_request_is_not_held_up():
    log, scheduler = [], Scheduler(Engine(), stall_s=1000)
    ticket = scheduler.submit(prefilling("part", 30, log))
    scheduler.turn()
    assert len(ticket.steps) == 1


@pytest.mark.parametrize("stall", [0.0, 1000.0])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outputs_do_not_depend_on_where_a_prefill_rests(family, stall):
    graph = graph_of(family, TreeDrafter("chain:3"), GreedyVerifier())
    prompts = [tiny.prompt(family, seed=number, frames=3) for number in range(3)]
    want = [tokens_of(list(graph.decode(prompt, 14))) for prompt in prompts]
    scheduler = Scheduler(graph.engine, stall_s=stall)
    tickets = [scheduler.submit(graph.work(prompts[0], 14))]
    for prompt in prompts[1:]:
        while not tickets[0].steps:
            with torch.inference_mode():
                scheduler.turn()
        tickets.append(scheduler.submit(graph.work(prompt, 14)))
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == want


def test_a_request_that_is_cancelled_while_its_prefill_rests_gives_all_back():
    graph = graph_of("qwen2_5_vl", TreeDrafter("chain:3"), GreedyVerifier())
    prompt = tiny.prompt("qwen2_5_vl", frames=3)
    scheduler = SharedScheduler(graph.engine, CPU, stall_s=0.0)
    running, late = scheduler.submit(graph.work(prompt, 30)), None
    for number in range(40):
        if scheduler.step(running) is None:
            break
        if number == 2:
            late = scheduler.submit(graph.work(prompt, 5))
        if number == 4:
            assert late.resting is not None
            scheduler.cancel(late)
    assert late.done and not graph.caches._leased
