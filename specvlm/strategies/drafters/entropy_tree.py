"""Draft deep and narrow where the draft model is sure, shallow and wide where it is not (SAGE)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated

from specvlm.strategies.drafters.dynamic_tree import WIDEST, GrownTreeDrafter, Growth, Pace
from specvlm.types import DEEPEST, MOST_GUESSES, Within

TOP = 10  # tokens whose entropy tells how sure the draft is
FIRST = 0.5  # confidence of the round before the first
ROUNDS, FEW, MANY = 10, 2, 3  # rounds whose mean acceptance lowers or raises the greatest depth
STEP = 8  # sizes of trees: a check is captured once for a size


@dataclass(frozen=True)
class EntropyTreeDrafter(GrownTreeDrafter):
    """A tree whose depth, width and thresholds follow the entropy of the draft's distribution in the round before.

    With p the draft's 10 highest probabilities below the root, made to add up to 1, and H their entropy, the confidence is
    a = 1 - H / log 10. The a of round t shapes the tree of round t + 1, since entropy hardly changes from one round to the
    next; 0.5 shapes the first. So a round's shape is known before its first pass:

    - depth D = shallow + a * (deep - shallow), width W = narrow + (1 - a) * (wide - narrow), both rounded;
    - a node reached with probability P (the product of the draft's probabilities on its way; 1 for the root) has
      W * (1 / l) * (0.5 + P) children on level l, its best tokens;
    - a node of level l is expanded if P exceeds 0.1 * l / D;
    - a tree has at most `nodes` guesses, 64 nodes with the root;
    - a mean acceptance below 2 over the last 10 rounds lowers `deep` by 1, above 3 raises it.

    SAGE (arXiv 2602.00523): all of this and its constants: a, 3 to 8 levels, width 2 to 10, 64 nodes, thresholds, history.
    Deviations: where we found no word on it, ours are these. The distribution is that of the draft, which alone is known while
    drafting; the number of children is rounded down and is at least 1; P is that of the whole way; `deep` stays between
    `shallow` and its own value; acceptance counts guesses alone, over fewer rounds while there are fewer than 10; of more
    than 64 nodes the most probable stay. For speed, the most probable other candidates fill a tree up to a multiple
    of 8 nodes, so that 8 captured checks serve all trees; the number of rows of a pass goes by D and W alone, and places the
    thresholds leave free go to the next most probable nodes.

    nodes: guesses at most; deep, shallow, narrow, wide: see above.
    Cost: D passes of the draft a round, of 3 to 24 rows after the first, and one read on the host, behind the last; up to 64
    rows in the target's check. An engine of graphs captures one program for each depth and width that comes up, 34 at most.
    Limits: as `dynamic_tree`. ValueError unless 1 <= shallow <= deep, 1 <= narrow <= wide and nodes >= 1.
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
        """Depth and width for a confidence, where `deepest` stands for `deep`."""
        depth = self.shallow + confidence * (deepest - self.shallow)
        width = self.narrow + (1 - confidence) * (self.wide - self.narrow)
        return int(depth + 0.5), int(width + 0.5)

    def extents(self) -> list[tuple[int, int]]:
        found: dict[tuple[int, int], None] = {}
        for deepest in range(self.shallow, self.deep + 1):
            # Between two neighbouring edges nothing changes; on an edge rounding may decide for either side.
            spans = (deepest - self.shallow, self.wide - self.narrow)
            edges = sorted({0.0, 1.0} | {(step + 0.5) / span for span in spans for step in range(span)})
            sides = [self.extent((low + high) / 2, deepest) for low, high in pairwise(edges)]
            for one, other in pairwise([sides[0], *sides]):
                depths, widths = zip(one, other, strict=True)
                found |= dict.fromkeys(product(depths, widths))
        return list(found)

    def growth(self, depth: int, width: int) -> Growth:
        levels, shares = range(1, depth + 1), [width / level for level in range(1, depth + 1)]
        rows, above = [], 1
        for level, share in zip(levels, shares, strict=True):
            # Children of `above` nodes whose probabilities add up to 1 at most; and no more can exceed the threshold.
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
    """The confidence of the round before, and what the last rounds accepted."""

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
