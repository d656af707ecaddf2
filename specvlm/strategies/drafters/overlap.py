"""Guess on while the target checks, below the outcomes that are likely, so that the next tree is mostly there in time.

Shape suffixes: M tree nodes, E nodes that are expanded, O outcomes, X corrections per node, Q rows of a pass,
V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.models.host_copy import HostCopy
from specvlm.models.passes import Routine, Work
from specvlm.strategies import DraftContext, Sampling
from specvlm.strategies.drafters.ahead import Plan, guess, plan_of, take
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession, drafting_model
from specvlm.types import DEEPEST, DraftTree, Verdict, Within

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

HOST = torch.device("cpu")
PROBE, REST = 8, 64  # rounds of guessing on that are weighed up, and rounds without it if it did not pay


@dataclass(frozen=True)
class OverlapDrafter(TreeDrafter):
    """A tree like that of `tree`, whose next tree is drafted while the target checks it.

    Outcomes of a check are pairs of the last accepted node and the target's next token there. The draft guesses the
    latter too: its likeliest tokens besides the node's children, called corrections. During the check it drafts below
    the likeliest outcomes at once: each pass has a row for each outcome, and rows cost little in a pass that reads all
    weights anyway. If one of them comes true (a hit), its tree, or the levels of it that are there, need not be drafted
    any more. Otherwise the tree is drafted as `tree` does. Both give the same tree, so the output, and under
    `sampling` its distribution, does not depend on speed or hits.

    The idea is that of parallel drafting: ParallelVLM (arXiv 2603.19610) and HIPPO (arXiv 2601.08273) draft one
    continuation during the check, the one in which all guesses are accepted.
    Deviations: all outcomes above with their corrections, as in speculative speculative decoding, instead of one; every
    guess is checked at once, none in a later window; greedy, sampled and coupled trees.

    Cost: during each check, one pass more than the tree has levels, of at most 64 rows. A pass that still runs when the
    verdict arrives delays the next round by its rest; if that outweighs the hits, guessing on rests for 64 rounds.
    Limits: it needs a device of its own for the draft (`draft.device=cuda:1`) and a target whose checks are captured;
    elsewhere, and while other requests share the checks, it drafts as `tree` does.

    Attributes:
        corrections: Tokens guessed per node as the target's next one.
        ahead: Draft passes during each check, always that many. 0: as many as fit, on a device of its own.

    Raises:
        ValueError: The shape is malformed, `children` is unknown, `corrections` is below 1 or `ahead` below 0.
    """

    name = "overlap"
    paper = "parallel drafting (ParallelVLM, arXiv 2603.19610; HIPPO, arXiv 2601.08273)"
    fidelity = "adapted"

    shape: str = "chain:5"
    corrections: Annotated[int, Within(1, 8)] = 2
    ahead: Annotated[int, Within(0, DEEPEST + 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corrections < 1 or self.ahead < 0:
            raise ValueError(f"corrections must be at least 1 and ahead at least 0, got {self.corrections} and {self.ahead}")

    @property
    def max_rows(self) -> int:
        return plan_of(self.fixed, self.corrections, False, HOST).rows

    def start(self, ctx: DraftContext) -> OverlapSession:
        if (widest := max(self.fixed.ranks) + 1 + self.corrections) > ctx.vocabulary:
            raise UserError(
                f"drafter.shape={self.shape} with corrections={self.corrections} asks {widest} guesses of a node,"
                f" there are {ctx.vocabulary} tokens"
            )
        return OverlapSession(ctx, drafting_model(ctx, self.model), self, self.rule_of(ctx))


class Worth:
    """Decides whether guessing on pays: the levels saved by hits against the passes that delayed a verdict.

    So a slow draft costs at most PROBE passes in PROBE + REST rounds.
    """

    def __init__(self) -> None:
        self.rounds = self.gain = self.rest = 0

    def went(self, saved: int, late: bool) -> None:
        """Record a round in which the draft guessed on. saved: Levels of a hit. late: The verdict waited for a pass."""
        self.rounds += 1
        self.gain += saved - (late and not saved)
        if self.rounds == PROBE:
            self.rest = REST if self.gain < 0 else 0
            self.rounds = self.gain = 0

    def resting(self) -> bool:
        """Whether not to guess on in this round. Counts the round."""
        self.rest = max(0, self.rest - 1)
        return self.rest > 0


class Pace:
    """Learns how long checks and passes ahead take, to start a pass before the last one has ended where that is safe.

    A pass that was started cannot be taken back, so near the end of a check only one is on its way.
    """

    def __init__(self) -> None:
        self.check_s = self.pass_s = 0.0
        self.begun = perf_counter()

    def begin(self) -> None:
        """Begin a round: the check has just started."""
        self.begun = perf_counter()

    def early(self, waiting: int) -> bool:
        """Whether one pass more than the `waiting` ones will end before the check. False as long as nothing is known."""
        return 0 < self.pass_s * (waiting + 1) < self.check_s - (perf_counter() - self.begun)

    def end(self, passes: int, done: bool) -> None:
        """End a round. passes: Those that have run since its beginning. done: Whether the verdict came meanwhile."""
        passed = perf_counter() - self.begun
        self.pass_s = passed / passes if passes else self.pass_s
        self.check_s = passed if done else max(self.check_s, passed)


class OverlapSession(TreeSession):
    """Drafts a static tree, or takes it from what was drafted during the check."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: OverlapDrafter, rule: Sampling | None) -> None:
        shape, more = drafter.fixed, drafter.corrections
        sample = rule is not None and not rule.coupled
        self.plan: Plan = plan_of(shape, more, sample, model.head_device)
        super().__init__(ctx, model, shape, rule, self.plan.rows, more)
        apart = model.ranks.size == 1 and model.head_device not in [stage.device for stage in ctx.target.stages]
        self.limit, self.fitting = drafter.ahead or (len(self.plan.pieces) if apart else 0), not drafter.ahead
        self.depth, self.worth, self.pace = len(shape.levels), Worth(), Pace()
        self.expanded = torch.tensor([node for level in shape.levels for node in level], device=self.device)
        self.others = torch.zeros(len(self.expanded), more, dtype=torch.int64, device=self.device)
        self.drawn = False  # whether `races` are those of the next tree already
        self.pool = torch.zeros(self.plan.size, dtype=torch.int64, device=self.device)
        self.passes, self.late = 0, False  # passes ahead in this round; whether one still ran when the verdict came
        self.q_QV: list[Tensor] = []
        self.bonuses: HostCopy | None = None
        self.taking = Routine(
            partial(take, self.plan), ("take", shape, more, sample), model, self.cache, 1, (self.free, 0), (self.pool,)
        )

    def guess_on(self, done: Callable[[], bool]) -> Work[None] | None:
        self.passes, self.late, self.q_QV, self.bonuses = 0, False, [], None
        if not self.limit or (self.fitting and self.worth.resting()):
            return None
        return self._guess_on(done)

    def _guess_on(self, done: Callable[[], bool]) -> Work[None]:
        """Run passes below the outcomes until all have run or the verdict is there."""
        found, running = [self.tokens, self.others.flatten()], deque[HostCopy]()
        self.pool = torch.cat([*found, self.pool.new_zeros(self.plan.size - sum(map(len, found)))])
        state = (self.root, self.cache.offset, *self.noise)
        self.pace.begin()
        for number in range(min(self.limit, len(self.plan.pieces))):
            if self.fitting and self._verdict_before(running, done):
                break
            self.pool, *q = yield self._piece(number)(state, self.pool, self._races())
            self.passes, self.q_QV = number + 1, [*self.q_QV, *q]
            running.append(HostCopy(self.pool.index_select(0, self.plan.bonus_O)))
            self.bonuses = self.bonuses or running[-1]
        if self.fitting:
            self.late = self._verdict_before(running, done)
            self.pace.end(self.passes - len(running), self.late)

    def _verdict_before(self, running: deque[HostCopy], done: Callable[[], bool]) -> bool:
        """Wait until one more pass may start, and say whether the verdict came before. running: Passes on their way."""
        while not done():
            while running and running[0].done:
                running.popleft()
            if not running or self.pace.early(len(running)):
                return False
            sleep(0)  # other threads may run
        return True

    def _piece(self, number: int) -> Routine:
        """Return the routine of one pass ahead."""
        piece, vocabulary, more = self.plan.pieces[number], self.ctx.vocabulary, self.more
        return Routine(
            partial(guess, piece, vocabulary, self.rule, more),
            ("ahead", number, self.shape, vocabulary, self.rule, more),
            self.model,
            self.cache,
            piece.feed_Q.numel(),
            (self.free, 0, 0, 0),
            (torch.zeros_like(self.pool), self.races),
        )

    def _races(self) -> Tensor | None:
        """Return the random numbers of the next tree; drawn once per tree, whether it is drafted ahead or not."""
        if not self.sample:
            return None
        if not self.drawn:
            self.races.exponential_(generator=self.generator)
            self.drawn = True
        return self.races

    def outcome(self, last: Verdict) -> int | None:
        """Return the number of the outcome that came true, if any level of its tree is there."""
        if self.bonuses is None:
            return None
        for number, ((node, _), bonus) in enumerate(zip(self.plan.outcomes, self.bonuses.read(), strict=True)):
            if (node, bonus) == (last.path[-1], last.bonus) and self.plan.levels(number, self.passes, self.depth):
                return number
        return None

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Take the tree of the outcome that came true and draft its missing levels, or draft the tree anew."""
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        number = None if last is None else self.outcome(last)
        first = 0 if number is None else self.plan.levels(number, self.passes, self.depth)
        self.drafted_ahead = first if self.passes else None
        if self.passes:
            self.worth.went(first, self.late)
        races, base, q_MV = self._races(), self.root + self.shape.depths[node], self.races
        if number is not None:
            self.tokens, self.others = yield self.taking((self.root, number), self.pool)
        if first < self.depth:
            routine = self.feed_root if self.shape.children[node] else self.feed_both
            known = (self.others,) if first else ()
            routine = self.round_of(2, first, *known) if first else routine
            state = (self.root, base, node, bonus, self.cache.offset, *self.noise)
            self.tokens, q_MV, self.others = yield routine(state, self.tokens, races, *known)
        if self.sample and number is not None:
            q_MV = self._with_those_ahead(q_MV if first < self.depth else None, number, first)
        self.root, self.drawn, self.passes = base + 1, False, 0
        return DraftTree(self.tokens, self.shape.parents, q_MV if self.sample else None, ranks=self.shape.ranks)

    def _with_those_ahead(self, q_MV: Tensor | None, number: int, first: int) -> Tensor:
        """Put the distributions of the levels that were drafted ahead into those of a tree."""
        ahead_QV, count = torch.cat(self.q_QV), sum(map(len, self.shape.levels[:first]))
        rows = self.plan.found_OE[number, :count]
        q_MV = ahead_QV.new_zeros(len(self.shape), ahead_QV.shape[1]) if q_MV is None else q_MV
        return q_MV.index_copy(0, self.expanded[:count], ahead_QV.index_select(0, rows))
