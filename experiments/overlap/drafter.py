"""Benchmark drafters that do all the work of `tree` and `overlap`; what each check accepts, and the hits, are given.

Models with random weights never agree, so outcomes are given or replayed, and only time is measured.

Shape suffixes: T tokens of the known answer, M tree nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_pair.drafter import guesses
from specvlm.models.passes import Work
from specvlm.strategies import DraftContext
from specvlm.strategies.drafters.overlap import OverlapDrafter, OverlapSession
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession, drafting_model
from specvlm.types import DraftTree, TreeShape, Verdict


@dataclass(frozen=True)
class Given:
    """What is to come true.

    Attributes:
        known: The target's answer to the same prompt, from an earlier run.
        outcomes: Of each round in turn, the guesses accepted, and whether the outcome was drafted ahead.
    """

    known: tuple[int, ...] = ()
    outcomes: tuple[tuple[int, bool], ...] = ((0, False),)

    def of(self, number: int) -> tuple[int, bool]:
        """Return the outcome of a round; the list begins anew at its end."""
        return self.outcomes[number % len(self.outcomes)]


class GivenRounds(TreeSession):
    """Mixin that overwrites a session's tokens in place, so that given guesses are right."""

    def prepare(self, given: Given) -> None:
        """Make the tables of the guesses."""
        self.given, self.rounds = given, 0
        self.position = 0 if given.known and given.known[0] == self.ctx.bonus else len(given.known)
        self.right = {
            many: table_of(self.shape, given.known, many, self.ctx.vocabulary).to(self.device)
            for many in {accepted for accepted, _ in given.outcomes}
        }

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        known = self.given.known
        if last is not None:
            at = self.position + len(last.path)
            self.position = at if at < len(known) and known[at] == last.bonus else len(known)
        tree = yield from super().propose(last)  # type: ignore[misc]
        if self.position < len(known):
            accepted, _ = self.given.of(self.rounds)
            tree.tokens[:] = self.right[accepted][self.position]
        self.rounds += 1
        return tree  # type: ignore[no-any-return]


class GivenTreeSession(GivenRounds):
    """Drafts as `tree` does."""


class GivenOverlapSession(GivenRounds, OverlapSession):
    """Drafts as `overlap` does. Whether an outcome was drafted ahead is given, how far it got is not."""

    def outcome(self, last: Verdict) -> int | None:
        _, hit = self.given.of(self.rounds - 1)
        assert self.bonuses is not None and self.bonuses.read()  # the real one reads it too
        found = (number for number, (node, _) in enumerate(self.plan.outcomes) if node == last.path[-1])
        return next(found, None) if hit else None


@dataclass(frozen=True)
class GivenTreeDrafter(TreeDrafter):
    """`tree` with given outcomes."""

    name = "given_tree"
    given: Given = field(default_factory=Given)

    def start(self, ctx: DraftContext) -> TreeSession:
        session = GivenTreeSession(ctx, drafting_model(ctx, self.model), self.fixed, self.rule_of(ctx))
        session.prepare(self.given)
        return session


@dataclass(frozen=True)
class GivenOverlapDrafter(OverlapDrafter):
    """`overlap` with given outcomes."""

    name = "given_overlap"
    given: Given = field(default_factory=Given)

    def start(self, ctx: DraftContext) -> OverlapSession:
        session = GivenOverlapSession(ctx, drafting_model(ctx, self.model), self, self.rule_of(ctx))
        session.prepare(self.given)
        return session


def table_of(shape: TreeShape, known: Sequence[int], accepted: int, vocabulary: int) -> Tensor:
    """Make a (T, M) table: a tree whose root is known[t], and whose best children are right down to depth `accepted`."""
    return torch.cat([torch.tensor([*known])[:, None], guesses(shape, known, accepted, vocabulary)], 1)


def spread(mean: float, hits: float, rounds: int) -> tuple[tuple[int, bool], ...]:
    """Make outcomes with a mean of guesses accepted and a share of hits, both as even as integers allow."""
    return tuple(
        (int((n + 1) * mean + 1e-9) - int(n * mean + 1e-9), int((n + 1) * hits + 1e-9) > int(n * hits + 1e-9))
        for n in range(rounds)
    )


def replayed(rows: Sequence[dict[str, Any]], corrections: int) -> tuple[tuple[int, bool], ...]:
    """Make outcomes from recorded rows (see record.py), of a draft that guesses so many corrections."""
    return tuple((accepted, 0 <= rank < corrections) for row in rows for accepted, rank in row["rounds"])
