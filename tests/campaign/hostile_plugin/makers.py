"""What makes a strategy of a function: the function is its attack, everything else is honest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from specvlm.models.passes import driven
from specvlm.strategies import DraftSession, Pruner
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import KeepSet

FOUND: list[type] = []
Attack = Callable[..., Any]


class EvenPruner(Pruner):
    """Keeps tokens evenly."""

    def select(self, ctx):
        self.attack(ctx)
        return KeepSet.uniform(ctx.total, ctx.budget, ctx.device)

    def attack(self, ctx):
        """Of a pruner that attacks elsewhere: none."""


@dataclass(frozen=True)
class ShortDrafter(TreeDrafter):
    """Two guesses a round, by the draft model."""

    shape: str = "chain:2"

    def start(self, ctx):
        self.attack(ctx)
        return Session(self, super().start(ctx), ctx)

    def attack(self, ctx):
        """Of a drafter that attacks elsewhere: none."""

    def answer(self, ctx, last, tree):
        return tree


class Session(DraftSession):
    """Honest, and what its drafter makes of that."""

    def __init__(self, drafter, inner, ctx):
        self.drafter, self.inner, self.ctx = drafter, inner, ctx

    def propose(self, last):
        tree = yield from driven(self.inner.propose(last))
        return (yield from driven(self.drafter.answer(self.ctx, last, tree)))


class Rule(GreedyVerifier):
    """Accepts what the target would have written."""

    def verify(self, ctx):
        return self.attack(ctx, super().verify(ctx))

    def attack(self, ctx, verdict):
        return verdict


@dataclass(frozen=True)
class FewScenes(SyntheticDataset):
    """Two scenes, and no attack."""

    name = "few_scenes"
    scenes: int = 2


BASES = {"pruner": EvenPruner, "drafter": ShortDrafter, "verifier": Rule, "dataset": FewScenes}


def strategy(kind: str, name: str, mechanism: str, about: str | None = None, **content: Any) -> None:
    """Register a class of that kind with these members."""
    own = {"name": name, "mechanism": mechanism, "__module__": __name__, "__doc__": about or name.replace("_", " ")}
    FOUND.append(dataclass(frozen=True)(type(name, (BASES[kind],), own | content)))


def _maker(kind: str, member: str) -> Callable[..., Callable[[Attack], Attack]]:
    def maker(mechanism: str, *needs: str, **content: Any) -> Callable[[Attack], Attack]:
        def make(attack: Attack) -> Attack:
            asked = {"needs": frozenset(needs)} if needs else {}
            strategy(kind, attack.__name__, mechanism, attack.__doc__, **{member: attack}, **asked, **content)
            return attack

        return make

    return maker


select = _maker("pruner", "attack")  # (self, ctx), before the honest choice
chooses = _maker("pruner", "select")  # (self, ctx), instead of it
weighs = _maker("pruner", "row_weights")  # (self, text_TD, features_ND), whose result counts
starts = _maker("drafter", "attack")  # (self, ctx), before the session begins
proposes = _maker("drafter", "answer")  # (self, ctx, last, tree), whose result is the tree
sees = _maker("drafter", "own_budget")  # (self, prompt)
decides = _maker("verifier", "attack")  # (self, ctx, verdict), whose result is the verdict
samples = _maker("dataset", "samples")  # (self)


def caller(kind: str) -> Any:
    """The nearest object of a class of that name among the local variables of those who called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if type(value).__name__ == kind:
                return value
        frame = frame.f_back
    raise LookupError(f"nobody who called has a {kind}")
