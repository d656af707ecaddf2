"""Predict rounds of `overlap`, whose draft works during the check, from separate costs of drafting and checking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from specvlm.advise.acceptance import Known, Replay
from specvlm.advise.advice import Candidate
from specvlm.types import TreeShape

CORRECTIONS = 2  # as the drafter's default
GUESSED = 0.75  # share of hits if no ranks were measured; the embedded pairs have 0.71 to 0.98 with chains of 5


@dataclass(frozen=True)
class Overlapped:
    """Costs of a round whose draft has a device of its own.

    Attributes:
        draft_pass: Milliseconds of a draft pass.
        check: Milliseconds of a check.
        alone: Milliseconds of a target's pass of one row. A pass ahead has about as many rows as a check, so it takes
            longer than a pass of the tree in the same proportion. 0: it takes no longer.
        host: Milliseconds of a round that are neither.
    """

    draft_pass: float
    check: float
    alone: float = 0.0
    host: float = 0.0

    @property
    def pass_ahead(self) -> float:
        """Milliseconds of a draft pass during the check."""
        return self.draft_pass * (max(1.0, self.check / self.alone) if self.alone else 1.0)

    def outcome_ms(self, levels: int, first: int | None) -> float:
        """Predict the time of a round, given whether the outcome of the check was guessed.

        Args:
            levels: Levels of the tree, with one draft pass each.
            first: Number of the pass ahead that feeds the outcome's root: 0, or 1 after a leaf. None: it was not
                guessed.
        """
        # A pass that runs when the verdict arrives is waited for; all of them are levels + 1.
        passes = min(levels + 1, max(1, ceil(self.check / self.pass_ahead)))
        ready = 0 if first is None else min(levels, max(0, passes - first))
        return self.host + max(self.check, passes * self.pass_ahead) + (levels - ready) * self.draft_pass

    def floor_ms(self, levels: int, full: float) -> float:
        """Return the least time of a round whose outcome is always guessed: the longer of its check and its draft passes."""
        return max((levels + full) * self.draft_pass, self.check)

    def round_ms(self, levels: int, hits: float, full: float) -> float:
        """Predict the mean time of a round.

        Args:
            levels: Levels of the tree.
            hits: Share of rounds whose outcome was guessed.
            full: Share of rounds that accept a leaf.
        """
        hit = full * self.outcome_ms(levels, 1) + (1 - full) * self.outcome_ms(levels, 0)
        return hits * hit + (1 - hits) * self.outcome_ms(levels, None)


def outcomes(ranks: Sequence[int], shape: TreeShape, corrections: int = CORRECTIONS) -> tuple[float, float]:
    """Replay measured ranks (see `Replay`). Returns the share of rounds that are hits, and of those that accept a leaf.

    All corrections of all nodes count as guessed, so for trees of many nodes the share is an upper bound.
    """
    below = [{shape.ranks[child]: child for child in children} for children in shape.children]
    at, rounds, hits, full = 0, 0, 0, 0
    while at < len(ranks):
        node = 0
        while at < len(ranks) and (child := below[node].get(ranks[at])) is not None:
            node, at = child, at + 1
        if at < len(ranks):
            free = ranks[at] - sum(rank < ranks[at] for rank in below[node])
            rounds, hits, full = rounds + 1, hits + (free < corrections), full + (not below[node])
        at += 1
    return (hits / rounds, full / rounds) if rounds else (0.0, 0.0)


def overlapped(found: Sequence[Candidate], known: Known, alone_ms: float) -> list[Candidate]:
    """Predict `overlap` with the shapes of `tree` among the candidates, for a draft on a device of its own.

    Args:
        found: Candidates.
        known: What is known of their acceptance.
        alone_ms: Milliseconds of a target's pass of one row.
    """
    more = []
    for one in found:
        if one.drafter != "tree" or one.ratio is None:
            continue
        shape, ratio = TreeShape.parse(one.shape), one.ratio
        guess = known["tree", min((at for name, at in known if name == "tree"), key=lambda at: abs(at - ratio))]
        share = min(1.0, one.accepted / shape.depth) ** shape.depth
        hits, full = outcomes(guess.ranks, shape) if isinstance(guess, Replay) else (GUESSED, share)
        levels = len(shape.levels)
        ms = Overlapped(one.draft_ms / levels, one.check_ms, alone_ms).round_ms(levels, hits, full)
        more.append(replace(one, drafter="overlap", draft_ms=ms - one.check_ms))
    return more
