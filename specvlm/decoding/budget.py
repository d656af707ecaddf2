"""Choose how many tokens requests guess: for each round, the tree shape that gives the most tokens per millisecond.

Requests that run at the same time share a round: one pass of the target over all their rows, and one draft pass per
level of a tree. All get the shape with the highest rate, the expected number of tokens per ms of the round. A guess is
expected to be accepted with the product of the chances along its path. If the engine does not capture shapes, a request
that accepts less may get a smaller shape: the chain that gains most over what its rows cost at the round's rate.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from specvlm.decoding.prices import Prices
from specvlm.engine import Engine
from specvlm.engine.steps import REQUESTS
from specvlm.strategies import Drafter
from specvlm.strategies.drafters.shapes import ROOT, shapes_for
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.fence import inside, sizes_of
from specvlm.types import DraftTree, TreeShape, Verdict, children_of
from specvlm.types.chances import expected
from specvlm.types.costs import RoundCost, sizes_of_round

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

# All constants of the decision.
ROWS = 128  # most rows that several trees together may have in a pass of the target: captured passes have no more
FIRST, WEIGHT = 0.7, 8.0  # prior acceptance, and the number of guesses that it counts as
FORGETS, POOL_FORGETS = 0.97, 0.995  # decay of older verdicts with each new one: per request, and for all requests of a pair
REVIEW = 8  # rounds of the same requests until their shape is chosen again
BETTER = 1.05  # a shape replaces the last one if its rate is higher by this factor
TRIALS = ("chain:4", "chain:2", "chain:4")  # shapes of a pair's first rounds, different enough to measure the costs
STEADY = tuple(
    shape for shape in shapes_for(captured=True) if len(shape) == shape.depth + 1
)  # shapes of requests with `Share.steady`: chains that all engines allow
RETRY = 48  # after this many rounds without guesses, a round tries some


class Acceptance:
    """Estimates the chance that the best guess at each depth is right if those above it are: Beta counts of verdicts.

    Args:
        prior: The prior: acceptance of the pair's requests so far. None: FIRST for depth 1, and for each greater depth
            the chance found for the depth above.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self.prior, self.forgets = prior, FORGETS if prior else POOL_FORGETS
        self.right: list[float] = []
        self.tried: list[float] = []
        self._tokens: dict[TreeShape, float] = {}

    def saw(self, tree: DraftTree, path: tuple[int, ...]) -> None:
        """Count a verdict. path: accepted nodes of the tree, root first."""
        self._tokens.clear()
        self.right, self.tried = ([self.forgets * count for count in counts] for counts in (self.right, self.tried))
        below, following = children_of(tree.parents), (*path[1:], -1)
        for depth, (node, taken) in enumerate(zip(path, following, strict=True)):
            if not below[node]:
                break
            if depth == len(self.tried):
                self.right.append(0.0)
                self.tried.append(0.0)
            self.tried[depth] += 1
            self.right[depth] += taken == below[node][0]

    def chances(self, depth: int) -> list[float]:
        """Return the chances of depths 1 to `depth`."""
        found, assumed, prior = list[float](), FIRST, self.prior.chances(depth) if self.prior else []
        for at in range(depth):
            right, tried = (self.right[at], self.tried[at]) if at < len(self.tried) else (0.0, 0.0)
            assumed = (right + WEIGHT * (prior[at] if prior else assumed)) / (tried + WEIGHT)
            found.append(assumed)
        return found

    def tokens(self, shape: TreeShape) -> float:
        """Return the expected number of tokens of a round with a tree of this shape."""
        if shape not in self._tokens:
            self._tokens[shape] = 1.0 + expected(shape, self.chances(shape.depth))
        return self._tokens[shape]


@dataclass(eq=False)
class Share:
    """A running request: what a budget has to know of it.

    Attributes:
        target: Id of its target model. Requests with the same target share passes.
        rows: Rows that it has in a pass of the target: those of its last tree if a budget chose it, else the maximum.
        budget: The budget of its pair. None: the drafter chooses its shapes, or there is no drafter.
        most: Maximum number of nodes of its trees.
        steady: Prices for a request whose answer depends on its guesses, or whose target is shared by several ranks.
            Its shapes depend only on these prices and its own verdicts, not on a clock or other requests, so that the
            same seed gives the same answer and all ranks choose alike. None: its shapes are those of its rounds.
        decodes: Whether its prefill has ended. Before that it takes part in no round.
    """

    target: int
    rows: int = 1
    budget: Budget | None = None
    most: int = 1
    steady: Prices | None = None
    decodes: bool = False

    def __post_init__(self) -> None:
        self.acceptance = Acceptance(self.budget.acceptance if self.budget and self.steady is None else None)
        self.round: Round | None = None  # the last one in which it took part

    def next_shape(self) -> TreeShape:
        """Choose the shape of this request's next tree."""
        assert self.budget is not None
        self.decodes = True
        shape = self.budget.shape_for(self)
        self.rows = len(shape)
        return shape

    def saw(self, tree: DraftTree, verdict: Verdict, times_s: Mapping[str, float]) -> None:
        """Learn from a round. times_s: as in `Step`."""
        if self.budget is not None:
            self.budget.saw(self, tree, verdict, times_s)


@dataclass(eq=False)
class Round:
    """Shapes chosen for the requests of a round.

    Attributes:
        shape: The shape of most requests, which is also the deepest.
        rate: Expected tokens per ms; 0 if the shape is a trial.
        mine: Number of requests whose shapes the budget chooses.
        others: (number, rows) of the requests that share the target's pass but whose shapes the budget does not choose.
        own: The shape of each request that has chosen since the last review.
        shapes: The shape of each request that takes part.
        told: Whether any request has its verdict. If so, the next request that asks for a shape begins a new round.
        times_s: Shortest drafting time and shortest check time among requests whose trees have all levels.
    """

    shape: TreeShape
    rate: float
    mine: int
    others: tuple[int, int]
    own: dict[Share, TreeShape] = field(default_factory=dict)
    shapes: dict[Share, TreeShape] = field(default_factory=dict)
    told: bool = False
    times_s: tuple[float, float] | None = None

    def saw(self, shape: TreeShape, draft_s: float, check_s: float) -> None:
        """Add a request's times. Ignores a tree with fewer levels, whose check includes waiting for the others."""
        if shape.depth == self.shape.depth:
            known = self.times_s or (draft_s, check_s)
            self.times_s = min(known[0], draft_s), min(known[1], check_s)

    def cost(self) -> RoundCost | None:
        """Return the round's cost; None if it was not measured."""
        if self.times_s is None:
            return None
        (count, more), sizes = self.others, [sizes_of_round(shape) for shape in self.shapes.values()]
        passes, rows, draft_rows = map(sum, zip(*sizes, strict=True))
        passes = max(each[0] for each in sizes)
        draft_ms, check_ms = (1000 * seconds for seconds in self.times_s)
        return RoundCost(len(sizes) + count, rows + more, passes, draft_rows, draft_ms, check_ms)


class Budget:
    """Chooses the shapes of the requests that run on one engine with one pair. Thread-safe.

    Args:
        running: Every request that runs on the engine, and a lock for it and for the budgets of all pairs.
        captured: Whether the engine captures each shape.
        known: Costs measured earlier.
    """

    def __init__(self, running: Running, captured: bool, known: tuple[RoundCost, ...]) -> None:
        self.running, self.captured, self.shapes = running, captured, shapes_for(captured)
        self.chains = [shape for shape in self.shapes if len(shape) == shape.depth + 1]
        self.prices, self.acceptance = Prices(known), Acceptance()
        self.round: Round | None = None
        self.last: Round | None = None  # some of its requests may not have reported their times yet
        self.plain = 0  # rounds without guesses, one after another
        self.number = 0  # of the round
        self.trials = [] if known else [TreeShape.parse(text) for text in TRIALS]

    def shape_for(self, share: Share) -> TreeShape:
        """Choose a request's shape for its round. All requests of a round ask before any of them has its verdict."""
        if (steady := share.steady) is not None:
            allowed = [shape for shape in STEADY if len(shape) <= share.most]
            return max(allowed, key=lambda shape: self._rate([share], shape, (0, 0), steady))
        with self.running.lock:
            if self.round is None or self.round.told or share in self.round.shapes:
                self._end()
                self.last, self.round = self.round, self._begin(share.target)
            share.round = self.round
            share.round.shapes[share] = shape = self._own(share, self.round)
            return shape

    def saw(self, share: Share, tree: DraftTree, verdict: Verdict, times_s: Mapping[str, float]) -> None:
        """Learn from a request's round."""
        with self.running.lock:
            share.acceptance.saw(tree, verdict.path)
            if share.steady is not None:
                return
            self.acceptance.saw(tree, verdict.path)
            if share.round is not None:
                share.round.told = True
                if "capture" not in times_s:
                    share.round.saw(share.round.shapes[share], times_s.get("draft", 0.0), times_s.get("verify", 0.0))

    def _begin(self, target: int) -> Round:
        """Begin a round of the requests with this target, and choose its shape."""
        self.number += 1
        every = [share for share in self.running.shares if share.decodes and share.target == target]
        mine = [share for share in every if share.budget is self and share.steady is None]
        others = len(every) - len(mine), sum(share.rows for share in every) - sum(share.rows for share in mine)
        old = self.round if self.round is not None and self.round.rate else None
        if old is not None and self.number % REVIEW and (old.mine, old.others) == (len(mine), others):
            return Round(old.shape, old.rate, old.mine, others, old.own)
        allowed = self._allowed(min(share.most for share in mine), len(mine))
        if self.trials and (trial := self.trials.pop()) in allowed:
            return Round(trial, 0.0, len(mine), others)
        if self.plain >= RETRY and len(allowed) > 1:
            return Round(allowed[1], 0.0, len(mine), others)
        rates = {shape: self._rate(mine, shape, others, self.prices) for shape in allowed}
        best = max(allowed, key=lambda shape: rates[shape])
        if old is not None and rates.get(old.shape, 0.0) * BETTER >= rates[best]:
            best = old.shape
        return Round(best, rates[best], len(mine), others)

    def _end(self) -> None:
        """End the current round. Learns the cost of the one before it, whose requests all have verdicts by now."""
        if self.round is not None:
            self.plain = self.plain + 1 if self.round.shape == ROOT else 0
        if self.last is not None and (cost := self.last.cost()) is not None:
            self.prices.saw(cost)

    def _allowed(self, most: int, requests: int) -> list[TreeShape]:
        """List shapes of up to `most` nodes that fit into a pass of `requests` requests. The first has no guesses."""
        most = min(most, ROWS // min(requests, REQUESTS))
        return [shape for shape in self.shapes if len(shape) <= most]

    def _rate(self, shares: Sequence[Share], shape: TreeShape, others: tuple[int, int], prices: Prices) -> float:
        """Return the expected tokens per ms of a round in which these requests have this shape."""
        (count, more), (passes, rows, draft_rows), many = others, sizes_of_round(shape), len(shares)
        tokens = count + sum(share.acceptance.tokens(shape) for share in shares)
        return tokens / prices.round_ms(many + count, many * rows + more, passes, many * draft_rows)

    def _own(self, share: Share, now: Round) -> TreeShape:
        """Return the shape of a request in a round: that of the round, or a smaller one if its last rows do not pay.

        If shapes are captured, all requests have the same one, since their drafts then run as one program.
        """
        if self.captured or not now.rate or now.shape == ROOT or sum(share.decodes for share in self.running.shares) == 1:
            return now.shape
        row_ms, draft_row_ms = self.prices.row_ms

        def worth(shape: TreeShape) -> float:
            _, rows, draft_rows = sizes_of_round(shape)
            return share.acceptance.tokens(shape) - now.rate * (rows * row_ms + draft_rows * draft_row_ms)

        if share not in now.own:
            fewer = max((one for one in self.chains if len(one) < len(now.shape)), key=worth)
            margin = (BETTER - 1) * share.acceptance.tokens(now.shape)
            now.own[share] = fewer if worth(fewer) > worth(now.shape) + margin else now.shape
        return now.own[share]


class Running:
    """The requests that run on an engine, and the budgets of their pairs."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.shares: dict[Share, None] = {}
        self.pairs: WeakKeyDictionary[VideoLM, WeakKeyDictionary[VideoLM, dict[Hashable, Budget]]] = WeakKeyDictionary()

    def budget(self, target: VideoLM, draft: VideoLM, captured: bool, known: tuple[RoundCost, ...]) -> Budget:
        """Return the budget of a pair; it learns as long as its models and the engine live."""
        found = self.pairs.setdefault(target, WeakKeyDictionary()).setdefault(draft, {})
        if known not in found:
            found[known] = Budget(self, captured, known)
        return found[known]


_RUNNING: WeakKeyDictionary[Engine, Running] = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def sharing(
    engine: Engine,
    target: VideoLM,
    draft: VideoLM | None = None,
    drafter: Drafter | None = None,
    joins: bool = True,
) -> Iterator[Share]:
    """Count a request among those that run on an engine, for the length of a block. Yields its share.

    Args:
        engine: The engine.
        target: The target.
        draft: The model that drafts, if any does.
        drafter: Its drafter; None for the target alone.
        joins: Whether other requests and measured times may decide its shapes, since its answer is the same for any
            guesses.
    """
    with _LOCK:
        running = _RUNNING.setdefault(engine, Running())
    share = Share(id(target)) if drafter is None else _share(running, engine, target, draft or target, drafter, joins)
    with running.lock:
        running.shares[share] = None
    try:
        yield share
    finally:
        with running.lock:
            del running.shares[share]


def _share(running: Running, engine: Engine, target: VideoLM, draft: VideoLM, drafter: Drafter, joins: bool) -> Share:
    """Make the share of a request with a drafter."""
    most, known = sizes_of(drafter)[0], drafter.known() if isinstance(drafter, TreeDrafter) else ()
    with inside(drafter):
        adapts = bool(drafter.adapts)
    if not adapts:
        return Share(id(target), most)
    with running.lock:
        budget = running.budget(target, draft, engine.captures, known)
    # Ranks whose clocks differ must not draft different trees.
    return Share(id(target), most, budget, most, None if joins and target.ranks.size == 1 else Prices(known))
