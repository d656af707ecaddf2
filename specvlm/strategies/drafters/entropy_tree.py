"""Draft a deep and narrow tree where the draft model is confident, a shallow and wide one where it is not (SAGE)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated

from specvlm.strategies.drafters.dynamic_tree import WIDEST, GrownTreeDrafter, Pace
from specvlm.strategies.drafters.growing import Growth
from specvlm.types import DEEPEST, MOST_GUESSES, Within

TOP = 10  # number of most probable tokens whose entropy gives the confidence
FIRST = 0.5  # confidence that shapes the first tree
ROUNDS, FEW, MANY = 10, 2, 3  # a mean acceptance over ROUNDS below FEW or above MANY changes the greatest depth
STEP = 8  # trees have a multiple of this many nodes: the check is captured once per size


@dataclass(frozen=True)
class EntropyTreeDrafter(GrownTreeDrafter):
    """A tree whose depth, width and thresholds follow the draft's entropy in the previous round.

    With p the draft's 10 highest probabilities below the root, normalized, and H their entropy, the confidence is
    a = 1 - H / log 10. The a of round t shapes the tree of round t + 1, since entropy changes little from one round to
    the next; a = 0.5 shapes the first tree. So the shape of a tree is known before its first pass:

    - depth D = shallow + a * (deep - shallow), width W = narrow + (1 - a) * (wide - narrow), both rounded;
    - a node reached with probability P (the product of the draft's probabilities on its path; 1 for the root) has
      W * (1 / l) * (0.5 + P) children on level l, which are its best tokens;
    - a node on level l is expanded if P exceeds 0.1 * l / D;
    - a tree has at most `nodes` guesses; by default 63, or 64 nodes with the root;
    - a mean acceptance below 2 over the last 10 rounds lowers `deep` by 1, one above 3 raises it.

    All of this is from SAGE (arXiv 2602.00523), with its constants: the first a, 3 to 8 levels, width 2 to 10, 64
    nodes, thresholds and history.
    Deviations: the paper leaves these open, as far as we can tell. The distribution is the draft's, the only one known
    while drafting. The number of children is rounded down and at least 1. P is that of the whole path. `deep` stays
    between `shallow` and its configured value. Acceptance counts guesses without the bonus token; in the
    first 9 rounds its mean is over the rounds so far. Of more than 64 nodes, the most probable stay. For speed, the
    most probable other candidates fill a tree up to a multiple of 8 nodes, so that 8 captured checks serve all trees.
    The number of rows of a pass depends only on D, W and the level; rows that the thresholds leave free go to the next
    most probable nodes.

    Cost: D draft passes per round, of 3 to 24 rows each after the first, one read on the host after the last, and up to
    64 rows in the target's check. The CUDA-graph engine captures one program per depth and width that occurs, at most
    34 by default. Limits: a draft that is confidently wrong grows the tree in the wrong place.

    Attributes:
        nodes: Maximum number of guesses per round.
        deep: Depth at full confidence.
        narrow: Width at full confidence.
        shallow: Depth at confidence 0.
        wide: Width at confidence 0.

    Raises:
        ValueError: Unless 1 <= shallow <= deep, 1 <= narrow <= wide and nodes >= 1.
    """

    name = "entropy_tree"
    paper = "SAGE (arXiv 2602.00523)"
    fidelity = "adapted"

    nodes: Annotated[int, Within(1, MOST_GUESSES)] = 63
    deep: Annotated[int, Within(1, DEEPEST)] = 8
    narrow: Annotated[int, Within(1, WIDEST)] = 2
    shallow: Annotated[int, Within(1, DEEPEST)] = 3
    wide: Annotated[int, Within(1, WIDEST)] = 10

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {self.nodes}")
        if not (1 <= self.shallow <= self.deep and 1 <= self.narrow <= self.wide):
            raise ValueError(
                "a tree needs 1 <= shallow <= deep and 1 <= narrow <= wide, got "
                f"{self.shallow}, {self.deep}, {self.narrow} and {self.wide}"
            )

    def extent(self, confidence: float, deepest: int) -> tuple[int, int]:
        """Return depth and width for a confidence, 0..1. deepest: takes the place of `deep`."""
        depth = self.shallow + confidence * (deepest - self.shallow)
        width = self.narrow + (1 - confidence) * (self.wide - self.narrow)
        return int(depth + 0.5), int(width + 0.5)

    def extents(self) -> list[tuple[int, int]]:
        """List the (depth, width) of every confidence from 0 to 1 and every value of `deepest`."""
        found: dict[tuple[int, int], None] = {}
        for deepest in range(self.shallow, self.deep + 1):
            # Depth and width are constant between two neighbouring edges; on an edge, rounding may go either way.
            spans = (deepest - self.shallow, self.wide - self.narrow)
            edges = sorted({0.0, 1.0} | {(step + 0.5) / span for span in spans for step in range(span)})
            sides = [self.extent((low + high) / 2, deepest) for low, high in pairwise(edges)]
            for one, other in pairwise([sides[0], *sides]):
                depths, widths = zip(one, other, strict=True)
                found |= dict.fromkeys(product(depths, widths))
        return list(found)

    def growth(self, depth: int, width: int) -> Growth:
        """Return how a tree grows. The rows of a level are the most nodes that can pass its threshold."""
        levels, shares = range(1, depth + 1), [width / level for level in range(1, depth + 1)]
        rows, above = [], 1
        for level, share in zip(levels, shares, strict=True):
            # The probabilities of the `above` nodes sum to at most 1, which bounds the number of their children. So do
            # the columns and the threshold.
            children = int(above * max(1.0, share / 2) + share)
            above = min(children, above * max(1, int(1.5 * share)), -(-10 * depth // level) - 1)
            rows.append(above)
        return Growth(
            columns=tuple(max(1, int(1.5 * share)) for share in shares),
            rows=tuple(rows[:-1]),
            nodes=self.nodes,
            shares=tuple(shares),
            least=tuple(0.1 * level / depth for level in levels[:-1]),
            step=STEP,
            top=TOP,
        )

    def pace(self) -> Pace:
        return EntropyPace(self)


class EntropyPace(Pace):
    """Sets depth and width by the last round's confidence and the mean acceptance of the last ROUNDS rounds."""

    def __init__(self, drafter: EntropyTreeDrafter) -> None:
        self.drafter, self.deepest = drafter, drafter.deep
        self.accepted: deque[int] = deque(maxlen=ROUNDS)
        super().__init__(*drafter.extent(FIRST, self.deepest))

    def went(self, accepted: int, confidence: float) -> None:
        self.accepted.append(accepted)
        mean = sum(self.accepted) / len(self.accepted)
        change = (mean > MANY) - (mean < FEW)
        self.deepest = min(self.drafter.deep, max(self.drafter.shallow, self.deepest + change))
        self.extent = self.drafter.extent(confidence, self.deepest)
