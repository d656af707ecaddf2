"""Predict rounds of the drafter `overlap` from separate costs of drafting and checking.

It drafts the next tree while the target checks the current one. Such a draft pass is called a pass ahead. The outcome
of a check is the last accepted node and the target's next token; a hit is an outcome that the draft has guessed.
"""

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
        alone: Milliseconds of the target's pass over one row. A pass ahead has about as many rows as a check, so it is
            taken to be slower than another draft pass by the same factor, check / alone. 0: it is as fast.
        host: Milliseconds of a round that are spent on neither drafting nor checking.
    """

    draft_pass: float
    check: float
    alone: float = 0.0
    host: float = 0.0

    @property
    def pass_ahead(self) -> float:
        """Milliseconds of a pass ahead."""
        return self.draft_pass * (max(1.0, self.check / self.alone) if self.alone else 1.0)

    def outcome_ms(self, levels: int, first: int | None) -> float:
        """Predict the time of a round, given whether the outcome of the check was guessed.

        Args:
            levels: Levels of the tree, with one draft pass each.
            first: Index of the pass ahead that runs the root of the next tree: 0, or 1 if the last accepted node is a
                leaf. None: the outcome was not guessed.
        """
        # At most levels + 1 passes run ahead. If one still runs when the verdict arrives, the round waits for its end.
        passes = min(levels + 1, max(1, ceil(self.check / self.pass_ahead)))
        ready = 0 if first is None else min(levels, max(0, passes - first))
        return self.host + max(self.check, passes * self.pass_ahead) + (levels - ready) * self.draft_pass

    def floor_ms(self, levels: int, full: float) -> float:
        """Return the least mean time of a round if all rounds are hits: the longer of the check and the draft passes.

        Args:
            levels: Levels of the tree.
            full: Share of rounds that accept a leaf.
        """
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
    """Replay measured ranks, as `Replay` does.

    Takes all corrections of all nodes to be guessed, so for trees of many nodes the share of hits is an upper bound.

    Args:
        ranks: As in `Replay`.
        shape: Shape of the tree.
        corrections: Tokens that `overlap` guesses at each node besides the node's children.

    Returns:
        The share of rounds that are hits, and the share of rounds that accept a leaf.
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
    """Predict, for each candidate of `tree`, one of `overlap` with the same shape and ratio.

    Args:
        found: Candidates. Those of other drafters are ignored.
        known: Acceptance by drafter and ratio.
        alone_ms: Milliseconds of the target's pass over one row.
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
