"""Random schedules: requests of unlike strategies come, end, fail, are cancelled and run out of memory, in float32.

Every request must have the tokens that it has alone, whoever else is there. None may starve, and no cache may stay leased.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from campaign import fork, threads  # noqa: F401  (of fork the environment: no hub, no plugins of the developer's)
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.room import cache_bytes
from specvlm.decoding.scheduler import PATIENCE, Decoding, Scheduler, Ticket
from specvlm.engine import Engine
from specvlm.models.kv_cache import CachePool
from specvlm.models.passes import Pass, Rows
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions

COUNT, SAMPLE = 500, 15
DRAFTERS = (*threads.DRAFTERS, None)  # None: the target alone
PRUNERS = (UniformPruner(), TwoStagePruner(), RandomPruner())
VERIFIERS = (GreedyVerifier(), SamplingVerifier(0.8, top_k=20), LooseVerifier(), CoupledVerifier(0.8, top_k=20))
MOST_TURNS = 12 * (PATIENCE + 1)  # between two steps: a round has at most 10 passes, each held at most PATIENCE turns
FATES = ("ends",) * 6 + ("cancelled", "fails", "out of memory")


@dataclass(frozen=True)
class Case:
    """A request: what it asks for, out of few choices, so that its answer alone is found once for many schedules."""

    family: str
    drafter: int
    pruner: int
    verifier: int
    seed: int
    frames: int
    limit: int
    ratio: float


@dataclass(eq=False)
class Guest:
    """A request in a schedule.

    fate: What is to become of it. comes: Turn of its arrival. goes: Number of its passes, or of turns after its arrival, to
    which its fate lets it live. last: Turn of its last step, or of its start.
    """

    case: Case
    fate: str
    comes: int
    goes: int
    ticket: Ticket = field(init=False)
    last: int = 0
    seen: int = 0


class Unlucky(Engine):
    """Runs out of memory in some joined passes, and always where a pass of a doomed request is alone."""

    def __init__(self, chance: random.Random, rate: float) -> None:
        self.chance, self.rate = chance, rate
        self.doomed: set[int] = set()  # ids of caches

    def run(self, passes: Sequence[Pass]) -> list[Rows]:
        bad = any(id(one.cache) in self.doomed for one in passes)
        if bad or (len(passes) > 1 and self.chance.random() < self.rate):
            if self.chance.random() < 0.5:  # as an engine would that fails half-way
                super().run(passes[:1])
            raise self.chance.choice(
                (torch.OutOfMemoryError("no memory left"), MemoryError(), RuntimeError("can't allocate memory"))
            )
        return super().run(passes)


@cache
def pair(family: str) -> tuple[Any, Any]:
    import tiny

    return tiny.model(family, dtype=torch.float32), tiny.draft_of(family, dtype=torch.float32)


def prompt_of(case: Case) -> Any:
    import tiny

    return tiny.prompt(case.family, seed=case.seed, frames=case.frames)


def graph_of(case: Case, engine: Engine, caches: CachePool) -> DecodingGraph:
    options = GenerationOptions(ratio=case.ratio, seed=case.seed, max_new_tokens=case.limit)
    drafter = DRAFTERS[case.drafter] or PromptLookupDrafter()
    strategies = PRUNERS[case.pruner], drafter, VERIFIERS[case.verifier]
    return DecodingGraph(*pair(case.family), *strategies, options, caches=caches, engine=engine)


def work_of(case: Case, engine: Engine, caches: CachePool) -> Decoding:
    graph = graph_of(case, engine, caches)
    if DRAFTERS[case.drafter] is None:
        return autoregressive_work(graph.target, prompt_of(case), graph.options, graph.verifier, caches, engine)
    return graph.work(prompt_of(case))


@cache
def answer(case: Case) -> list[int]:
    """Tokens of a request that runs alone."""
    scheduler = Scheduler(Engine())
    return tokens_of(list(scheduler.steps(scheduler.submit(work_of(case, Engine(), CachePool())))))


def drawn(chance: random.Random) -> Guest:
    import tiny

    choices = (len(DRAFTERS), len(PRUNERS), len(VERIFIERS))
    case = Case(
        chance.choice(tiny.FAMILIES),
        *map(chance.randrange, choices),
        seed=chance.randrange(3),
        frames=chance.choice((2, 3, 5)),
        limit=chance.choice((1, 4, 9, 16)),
        ratio=chance.choice((0.5, 0.9)),
    )
    return Guest(case, chance.choice(FATES), chance.randrange(30), chance.randint(1, 12))


def broken(work: Decoding, guest: Guest, engine: Unlucky) -> Decoding:
    """Run a request, and let its own code fail, or doom its passes, after `goes` passes."""
    result, passes = None, 0
    try:
        while True:
            item = work.send(result)
            if isinstance(item, Pass):
                passes += 1
                if passes == guest.goes and guest.fate == "fails":
                    raise OSError("its own fault")
                if passes >= guest.goes and guest.fate == "out of memory":
                    engine.doomed.add(id(item.cache))
            result = yield item
    except StopIteration:
        return
    finally:
        work.close()
        engine.doomed.clear()


def run(count: int, seed: int) -> list[str]:
    found = []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        guests = [drawn(chance) for _ in range(chance.randint(3, 8))]
        found += [f"seed {seed}, schedule {number}: {fault}" for fault in faults(guests, chance)]
    return found


def faults(guests: list[Guest], chance: random.Random) -> Iterator[str]:
    """Run a schedule and yield what is wrong with it."""
    wanted = [answer(guest.case) for guest in guests]  # first: making the tiny models draws of torch's global generator
    engine, caches = Unlucky(chance, chance.choice((0, 0.1, 0.5))), CachePool()
    sizes = [cache_bytes(graph_of(g.case, engine, caches), prompt_of(g.case)) for g in guests]
    room = chance.choice((None, max(sizes), 2 * max(sizes), sum(sizes)))
    scheduler = Scheduler(engine, room, chance.choice((None, None, 1, 3)))
    yield from played(guests, sizes, scheduler, engine, caches)
    for guest, want in zip(guests, wanted, strict=True):
        got, error = tokens_of(list(guest.ticket.steps)), guest.ticket.error
        whole = guest.fate == "ends" or (guest.fate != "cancelled" and error is None)
        if error is not None and guest.fate in ("ends", "cancelled"):
            yield f"{guest.case} failed by the fault of another: {type(error).__name__}: {error}"
        elif got != (want if whole else want[: len(got)]):
            yield f"{guest.case}, which {guest.fate}, gives {got}, alone {want}"
    if caches._leased:
        yield f"{len(caches._leased)} caches were not given back"


def played(guests: list[Guest], sizes: list[int], scheduler: Scheduler, engine: Unlucky, caches: CachePool) -> Iterator[str]:
    """Let the requests come and go, turn by turn, until all have ended. Yields what is wrong on the way."""
    started: list[Ticket] = []
    with torch.inference_mode():
        for turn in range(2000):
            for guest, size in zip(guests, sizes, strict=True):
                if guest.comes == turn:
                    guest.ticket = scheduler.submit(broken(work_of(guest.case, engine, caches), guest, engine), size)
                if guest.fate == "cancelled" and guest.comes + guest.goes == turn:
                    scheduler.cancel(guest.ticket)
            scheduler.turn()
            here = sorted((guest for guest in guests if guest.comes <= turn), key=lambda guest: guest.comes)
            started += [g.ticket for g in here if g.ticket not in started and g.ticket not in scheduler.waiting]
            if scheduler.room is not None and sum(ticket.size for ticket in scheduler.live) > scheduler.room:
                yield "more requests run than there is room for"
            for guest in here:
                if guest.ticket not in scheduler.live or len(guest.ticket.steps) > guest.seen:
                    guest.last, guest.seen = turn, len(guest.ticket.steps)
                elif turn - guest.last > MOST_TURNS:
                    yield f"{guest.case} starved: no step in {MOST_TURNS} turns"
                    return
            if len(here) == len(guests) and not scheduler.live and not scheduler.waiting:
                came = sorted((g for g in guests if g.fate != "cancelled"), key=lambda g: g.comes)
                order = [started.index(guest.ticket) for guest in came]
                if order != sorted(order):
                    yield f"requests started in the order {order} of their arrival"
                return
    yield "the schedule never ends"
