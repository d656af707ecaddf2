"""Random requests whose draft guesses on during checks, alone and several at once, in float32.

Each must have the tokens and rounds of the same request without guessing on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from campaign import fork  # noqa: F401  (its environment: no hub, no plugins of the developer's)
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, Step

COUNT, SAMPLE = 500, 6
SHAPES = ("chain:1", "chain:2", "chain:4", "chain:7", "2x2", "3x1x1", "4x2x1", "paper", "[[0],[1],[0,2],[0,2,1]]")
SAMPLED = (SamplingVerifier(0.7), SamplingVerifier(1.2, top_k=9))
VERIFIERS = (GreedyVerifier(), *SAMPLED, CoupledVerifier(0.7), CoupledVerifier(1.2, top_p=0.8))


@dataclass(frozen=True)
class Case:
    """A request: see `DecodingGraph` and `OverlapDrafter`. noise: of the draft's weights against the target's."""

    family: str
    shape: str
    verifier: int
    corrections: int
    ahead: int
    ratio: float
    seed: int
    noise: float
    limit: int
    frames: int
    penalty: float

    def graph(self, overlap: bool, engine: Engine) -> DecodingGraph:
        target, draft = pair(self.family, self.noise)
        drafter = (
            OverlapDrafter(self.shape, corrections=self.corrections, ahead=self.ahead) if overlap else TreeDrafter(self.shape)
        )
        options = GenerationOptions(ratio=self.ratio, seed=self.seed, repetition_penalty=self.penalty)
        return DecodingGraph(target, draft, UniformPruner(), drafter, VERIFIERS[self.verifier], options, engine=engine)

    def prompt(self) -> Any:
        import tiny

        return tiny.prompt(self.family, seed=self.seed, frames=self.frames)


@cache
def pair(family: str, noise: float) -> tuple[Any, Any]:
    import tiny

    return tiny.model(family, dtype=torch.float32), tiny.draft_of(family, noise, dtype=torch.float32)


def drawn(chance: random.Random) -> Case:
    """Draw a request."""
    import tiny

    return Case(
        chance.choice(tiny.FAMILIES),
        chance.choice(SHAPES),
        chance.randrange(len(VERIFIERS)),
        chance.choice((1, 2, 2, 3)),
        chance.choice((1, 2, 3, 129, 129)),
        chance.choice((0.0, 0.5, 0.9, 1.0)),
        chance.randrange(10),
        chance.choice((0.0, 0.02, 0.05, 0.1)),
        chance.choice((3, 12, 30)),
        chance.choice((2, 4)),
        chance.choice((1.0, 1.0, 1.2)),
    )


def rounds_of(steps: list[Step]) -> list[Any]:
    """Return what must be equal: the tokens of each step, its tree, and what was accepted of it."""
    return [(step.tokens, step.tree and (step.tree.tokens.tolist(), step.tree.parents), step.verdict) for step in steps]


def run(count: int, seed: int) -> list[str]:
    chance, found, done = random.Random(seed), list[str](), 0
    while done < count:
        cases = [drawn(chance) for _ in range(chance.choice((1, 1, 3)))]
        engine, backend = (Engine(), "eager") if chance.random() < 0.5 else (GraphsEngine("direct"), "graphs")
        want = [rounds_of(list(case.graph(False, engine).decode(case.prompt(), case.limit))) for case in cases]
        scheduler = Scheduler(engine)
        tickets = [scheduler.submit(case.graph(True, engine).work(case.prompt(), case.limit)) for case in cases]
        for case, ticket, right in zip(cases, tickets, want, strict=True):
            try:
                if rounds_of(list(scheduler.steps(ticket))) != right:
                    found.append(f"{len(cases)} at once, {backend}: {case} differs")
            except Exception as fault:
                found.append(f"{len(cases)} at once, {backend}: {case} raised {fault!r}")
        done += len(cases)
    return found
