"""Draft the next tree while the target checks the current one, below the likely outcomes of the check.

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
from specvlm.models.placement import apart
from specvlm.strategies import DraftContext, Sampling
from specvlm.strategies.drafters.ahead import Plan, guess, plan_of, take
from specvlm.strategies.drafters.pruned import drafting_model
from specvlm.strategies.drafters.shapes import AUTO
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession
from specvlm.types import DEEPEST, DraftTree, TreeShape, Verdict, Within

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

HOST = torch.device("cpu")
HITS, FIRST, MEMORY = 0.8, 4, 32  # prior hit rate, its weight in rounds, and number of rounds remembered
POLL_S = 5e-5  # seconds between two looks at whether a pass or the check has ended
FADE = 0.95  # factor by which a measured time fades in each round that does not measure it


@dataclass(frozen=True)
class OverlapDrafter(TreeDrafter):
    """A tree like that of `tree`, whose next tree is drafted while the target checks it.

    Outcomes of a check are pairs of the last accepted node and the target's next token there. The draft guesses the
    latter too: its likeliest tokens besides the node's children, called corrections. During the check it drafts below
    many of the likeliest outcomes together: each pass has rows for each of them, and rows cost little in a pass that
    reads all weights anyway. If one of them comes true (a hit), the levels of its tree that are ready need not be
    drafted again. Otherwise the tree is drafted as `tree` does. Both give the same tree, so the output, and under
    `sampling` its distribution, does not depend on speed or hits.

    The idea is that of parallel drafting: ParallelVLM (arXiv 2603.19610) and HIPPO (arXiv 2601.08273) draft one
    continuation during the check, the one in which all guesses are accepted.
    Deviations: many outcomes, with corrections, as in speculative speculative decoding, instead of one; all guesses of
    a tree are checked together, none in a later window; greedy, sampled and coupled trees.

    Cost: during each check, one pass more than the tree has levels, of at most 64 rows. A pass that still runs when the
    verdict arrives delays the next round, so one starts late in a check only if hits are frequent enough.
    Limits: it needs a device of its own for the draft (`draft.device=cuda:1`) and a target whose checks are captured;
    elsewhere, and while other requests share the checks, it drafts as `tree` does.

    Attributes:
        corrections: Number of tokens per node, besides its children, that are guessed to be the target's next one.
        ahead: Fixed number of draft passes during each check. 0: as many as fit, if the draft has a device of its own.

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
        if self.shape == AUTO:
            raise ValueError("shape=auto is for drafter=tree and drafter=self: give a shape")
        if self.corrections < 1 or self.ahead < 0:
            raise ValueError(f"corrections must be at least 1 and ahead at least 0, got {self.corrections} and {self.ahead}")

    @property
    def fixed(self) -> TreeShape:
        return TreeShape.parse(self.shape)

    @property
    def max_rows(self) -> int:
        return plan_of(self.fixed, self.corrections, False, HOST).rows

    def start(self, ctx: DraftContext) -> OverlapSession:
        if (widest := max(self.fixed.ranks) + 1 + self.corrections) > ctx.vocabulary:
            raise UserError(
                f"drafter.shape={self.shape} with corrections={self.corrections} needs {widest} guesses per node,"
                f" there are {ctx.vocabulary} tokens"
            )
        return OverlapSession(ctx, drafting_model(ctx, self.model), self, self.rule_of(ctx))


class Pace:
    """Decides when a pass ahead starts, from how long checks and passes take and how often the outcome was guessed.

    A pass cannot be stopped: if it still runs when the verdict arrives, the next round after a miss waits for its end.
    """

    def __init__(self) -> None:
        self.check_s = self.pass_s = 0.0  # 0: not known yet
        self.hits, self.seen = HITS, 0
        self.begun, self.slow = perf_counter(), False

    def begin(self, drafted: int) -> None:
        """Begin a round: the check has just started. drafted: Levels of its tree that were not drafted ahead."""
        now = perf_counter()
        if self.slow:  # the only pass ahead outlasted the check, and those of the tree followed it
            self.pass_s = (now - self.begun) / (1 + drafted)
        self.begun, self.slow = now, False

    def starts(self, waiting: int) -> bool:
        """Whether to start a pass now, while `waiting` others have not ended.

        Yes if it will end before the check. Otherwise only if all others have ended, and if the time that it saves
        after a hit outweighs the time that it costs after a miss.
        """
        if not (self.check_s and self.pass_s):
            return not waiting
        left = self.check_s - (perf_counter() - self.begun) - waiting * self.pass_s
        if left >= self.pass_s:
            return True
        return not waiting and self.hits * max(left, 0.0) > (1 - self.hits) * (self.pass_s - left)

    def end(self, started: int, ended: int, done: bool) -> None:
        """End a round, with the numbers of passes ahead started and ended. done: Whether the verdict is there."""
        passed = perf_counter() - self.begun
        self.check_s = passed if done else max(self.check_s, passed)
        self.slow = done and started > 0 and not ended
        if ended:
            self.pass_s = passed / ended
        elif not started:
            self.pass_s *= FADE  # so that it is measured again eventually

    def went(self, hit: bool) -> None:
        """Record whether an outcome was guessed."""
        self.seen += 1
        self.hits += (hit - self.hits) / min(self.seen + FIRST, MEMORY)


class OverlapSession(TreeSession):
    """Drafts a static tree, or takes it from what was drafted during the check."""

    def __init__(self, ctx: DraftContext, model: VideoLM, drafter: OverlapDrafter, rule: Sampling | None) -> None:
        shape, more = drafter.fixed, drafter.corrections
        sample = rule is not None and not rule.coupled
        self.plan: Plan = plan_of(shape, more, sample, model.head_device)
        super().__init__(ctx, model, shape, rule, self.plan.rows, more)
        limit, self.fitting = drafter.ahead or (DEEPEST + 1 if apart(model, ctx.target) else 0), not drafter.ahead
        self.depth, self.pace = len(shape.levels), Pace()
        self.expanded = torch.tensor([node for level in shape.levels for node in level], device=self.device)
        self.others = torch.zeros(len(self.expanded), more, dtype=torch.int64, device=self.device)
        self.drawn = False  # whether `races` are those of the next tree already
        self.pool = torch.zeros(self.plan.size, dtype=torch.int64, device=self.device)
        self.passes = self.late = 0  # passes ahead in this round; levels of the last tree that were drafted after the verdict
        self.q_QV: list[Tensor] = []
        self.bonuses: HostCopy | None = None
        self.pieces = [self._piece(number) for number in range(min(limit, len(self.plan.pieces)))]
        self.taking = Routine(
            partial(take, self.plan), ("take", shape, more, sample), model, self.cache, 1, (self.free, 0), (self.pool,)
        )

    def guess_on(self, done: Callable[[], bool]) -> Work[None] | None:
        self.passes, self.q_QV, self.bonuses = 0, [], None
        return self._guess_on(done) if self.pieces else None

    def _guess_on(self, done: Callable[[], bool]) -> Work[None]:
        """Run passes below the outcomes: the given number, or until the verdict is there."""
        found, running = [self.tokens, self.others.flatten()], deque[HostCopy]()
        self.pool = torch.cat([*found, self.pool.new_zeros(self.plan.size - sum(map(len, found)))])
        state = (self.root, self.cache.offset, *self.noise)
        self.pace.begin(self.late)
        while self.passes < len(self.pieces) and not (self.fitting and done()):
            while running and running[0].done:
                running.popleft()
            if self.fitting and not self.pace.starts(len(running)):
                sleep(POLL_S)
                continue
            self.pool, *q = yield self.pieces[self.passes](state, self.pool, self._races())
            running.append(HostCopy(self.pool.index_select(0, self.plan.bonus_O)))
            self.passes, self.q_QV = self.passes + 1, [*self.q_QV, *q]
            self.bonuses = self.bonuses or running[-1]
        if self.fitting:
            self.pace.end(self.passes, self.passes - len(running), done())
        # The corrections of expanded nodes are known without a pass.
        self.bonuses = self.bonuses or HostCopy(self.pool.index_select(0, self.plan.bonus_O))

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
        """Return the number of the outcome that came true; None if it was not guessed."""
        assert self.bonuses is not None
        for number, ((node, _), bonus) in enumerate(zip(self.plan.outcomes, self.bonuses.read(), strict=True)):
            if (node, bonus) == (last.path[-1], last.bonus):
                return number
        return None

    def _there(self, last: Verdict | None) -> tuple[int, int]:
        """Return the number of the outcome that came true, and how many levels of its tree are drafted, maybe 0."""
        self.drafted_ahead = None
        if last is None or self.bonuses is None:
            return 0, 0
        number, unknown = self.outcome(last), not self.passes and not self.shape.children[last.path[-1]]
        if not unknown:
            self.pace.went(number is not None)
        self.drafted_ahead = 0 if number is None else self.plan.levels(number, self.passes, self.depth)
        return number or 0, self.drafted_ahead

    def propose(self, last: Verdict | None) -> Work[DraftTree]:
        """Take the tree of the outcome that came true and draft its missing levels, or draft the whole tree."""
        node, bonus = (0, self.ctx.bonus) if last is None else (last.path[-1], last.bonus)
        number, first = self._there(last)
        races, base, q_MV = self._races(), self.root + self.shape.depths[node], self.races
        if first:
            self.tokens, self.others = yield self.taking((self.root, number), self.pool)
        if first < self.depth:
            known = (self.others,) if first else ()
            routine = self.routine(2, first, *known) if first else self.anew(bool(self.shape.children[node]))
            state = (self.root, base, node, bonus, self.cache.offset, *self.noise)
            self.tokens, q_MV, self.others = yield routine(state, self.tokens, races, *known)
        if self.sample and first:
            q_MV = self._with_those_ahead(q_MV if first < self.depth else None, number, first)
        self.root, self.drawn, self.late = base + 1, False, self.depth - first
        return DraftTree(self.tokens, self.shape.parents, q_MV if self.sample else None, ranks=self.shape.ranks)

    def _with_those_ahead(self, q_MV: Tensor | None, number: int, first: int) -> Tensor:
        """Insert the distributions of the levels that were drafted ahead into the `q` of a tree."""
        ahead_QV, count = torch.cat(self.q_QV), sum(map(len, self.shape.levels[:first]))
        rows = self.plan.found_OE[number, :count]
        q_MV = ahead_QV.new_zeros(len(self.shape), ahead_QV.shape[1]) if q_MV is None else q_MV
        return q_MV.index_copy(0, self.expanded[:count], ahead_QV.index_select(0, rows))
