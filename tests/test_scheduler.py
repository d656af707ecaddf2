"""Requests start when there is room, first come first served, and get in step with those that run."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from math import inf

import pytest
import tiny
import torch
from test_passes import DRAFTERS, graph_of, request_of

from specvlm.decoding.loop import autoregressive_work
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import PATIENCE, Scheduler
from specvlm.decoding.shared import SharedScheduler
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.models.kv_cache import CachePool
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier

FAMILY = "qwen2_5_vl"


@pytest.mark.parametrize("make", [Scheduler, partial(SharedScheduler, device=torch.device("cpu"))])
def test_a_request_that_can_never_fit_is_refused_at_once_with_what_to_change(make):
    graph = graph_of(FAMILY, TreeDrafter(), GreedyVerifier())
    prompt, limit = request_of(FAMILY, 0)
    size = cache_bytes(graph, prompt, limit)
    scheduler = make(Engine(), room=size - 1)
    with pytest.raises(UserError, match="MiB of KV cache, and all of them may use .*: lower max_new_tokens, frames or max_pix"):
        scheduler.submit(graph.work(prompt, limit), size)
    scheduler = make(Engine(), room=size)
    scheduler.submit(graph.work(prompt, limit), size)


def test_at_least_one_request_may_run():
    with pytest.raises(UserError, match="most=0"):
        Scheduler(Engine(), most=0)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: drafter.name)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_size_of_a_request_is_what_it_leases(family, drafter):
    caches = CachePool()
    graph = graph_of(family, drafter, GreedyVerifier(), caches=caches)
    prompt, _ = request_of(family, 0)
    for limit in (5, 300):
        next(steps := graph.decode(prompt, limit))
        next(steps)
        assert sum(cache.nbytes for _, cache in caches._leased) == cache_bytes(graph, prompt, limit)
        steps.close()
        caches.empty()


@pytest.mark.parametrize("bound", ["room", "most"])
def test_requests_start_in_the_order_in_which_they_came_as_soon_as_there_is_room(bound):
    caches = CachePool()
    graph = graph_of(FAMILY, TreeDrafter(), GreedyVerifier(), caches=caches)
    requests = [request_of(FAMILY, number) for number in range(4)]
    want = [tokens_of(list(graph.decode(*request))) for request in requests]
    sizes = [cache_bytes(graph, *request) for request in requests]
    caches.empty()
    limits = {"room": {"room": 2 * max(sizes)}, "most": {"most": 2}}
    scheduler = Scheduler(Engine(), **limits[bound], stall_s=inf)
    tickets = [scheduler.submit(graph.work(*request), size) for request, size in zip(requests, sizes, strict=True)]
    begun = []
    with torch.inference_mode():
        while scheduler.live or scheduler.waiting:
            scheduler.turn()
            assert len(scheduler.live) <= 2 and len(caches.held) <= 4
            begun += [ticket for ticket in tickets if ticket.steps and ticket not in begun]
    assert begun == tickets and [tokens_of(list(ticket.steps)) for ticket in tickets] == want


def test_a_waiting_request_that_is_cancelled_never_starts():
    graph = graph_of(FAMILY, PromptLookupDrafter(), GreedyVerifier())
    scheduler = Scheduler(Engine(), most=1, stall_s=inf)
    first, second, third = (scheduler.submit(graph.work(*request_of(FAMILY, number))) for number in range(3))
    scheduler.turn()
    scheduler.cancel(second)
    assert list(scheduler.waiting) == [third] and second.done and list(scheduler.steps(second)) == []
    assert len(list(scheduler.steps(third))) > 1 and first.done


def test_requests_out_of_step_have_their_trees_checked_in_one_pass():
    """The second comes while the first drafts: without waiting, neither check would ever be joined."""
    graph = graph_of(FAMILY, TreeDrafter("chain:3"), GreedyVerifier())
    want = [tokens_of(list(graph.decode(*request_of(FAMILY, number)))) for number in (0, 3)]

    class Counted(Engine):
        def run(self, passes):
            counts.append((passes[0].model is graph.target, len(passes)))
            return super().run(passes)

    counts = []
    scheduler = Scheduler(Counted(), stall_s=inf)
    first = scheduler.submit(graph.work(*request_of(FAMILY, 0)))
    for _ in range(3):
        scheduler.turn()
    second = scheduler.submit(graph.work(*request_of(FAMILY, 3)))
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in (first, second)] == want
    checks = [count for of_target, count in counts if of_target]
    both = checks.index(2)
    assert both <= 1 and 1 not in checks[both : both + checks.count(2)]


def test_a_request_without_a_drafter_waits_for_deep_drafts_but_not_for_ever():
    deep = graph_of(FAMILY, TreeDrafter(f"chain:{3 * PATIENCE}"), GreedyVerifier())
    prompt, limit = request_of(FAMILY, 0)
    want = tokens_of(list(deep.decode(prompt, limit)))
    scheduler = Scheduler(Engine(), stall_s=inf)
    slow = scheduler.submit(deep.work(prompt, limit))
    plain = scheduler.submit(autoregressive_work(deep.target, prompt, limit, GreedyVerifier(), deep.caches, Engine()))
    gaps, last = [], 0
    with torch.inference_mode():
        for turn in range(1000):
            scheduler.turn()
            if len(plain.steps) > len(gaps):
                gaps.append(turn - last)
                last = turn
            if not scheduler.live:
                break
    assert tokens_of(list(slow.steps)) == tokens_of(list(plain.steps)) == want and max(gaps) == PATIENCE + 1


@pytest.mark.slow
def test_a_request_that_failed_holds_no_tensors_until_its_error_is_read():
    kept = []

    def failing(work):
        tensor = torch.zeros(10)
        kept.append(weakref.ref(tensor))
        yield next(work)
        raise torch.OutOfMemoryError(f"no memory for {len(tensor)}")

    graph = graph_of(FAMILY, PromptLookupDrafter(), GreedyVerifier())
    want = tokens_of(list(graph.decode(*request_of(FAMILY, 1))))
    scheduler = Scheduler(Engine(), stall_s=inf)
    bad, good = (
        scheduler.submit(work) for work in (failing(graph.work(*request_of(FAMILY, 0))), graph.work(*request_of(FAMILY, 1)))
    )
    assert tokens_of(list(scheduler.steps(good))) == want
    gc.collect()
    assert bad.done and kept[0]() is None
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 10"):
        list(scheduler.steps(bad))
