"""Draft deep and narrow where the draft model is sure, shallow and wide where it is not (SAGE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from specvlm.drafters.dynamic_tree import WIDEST, GrownTreeDrafter
from specvlm.types import DEEPEST, MOST_GUESSES, Within


@dataclass(frozen=True)
class EntropyTreeDrafter(GrownTreeDrafter):
    """`dynamic_tree` whose depth and width follow the entropy H of the draft's distribution below the root, in every round.

    H at most `sure`: `deep` levels of `narrow` nodes; H at least `unsure`: `shallow` levels of `wide` nodes; between them both
    are interpolated linearly and rounded. The number of guesses stays `nodes`, so the target's check costs the same.

    SAGE (arXiv 2602.00523) has the rule, low entropy deep and narrow, high entropy shallow and wide; how its trees are laid out
    and every constant here (sure, unsure, deep, shallow, narrow, wide) is ours. sure, unsure: in nats (0.5: about 1.6
    choices; 2.5: about 12).

    Cost: `shallow` to `deep` passes a round and one read of a number between the first and the others; drafting is not
    captured, since its number of passes is decided in the middle of it. Limits: as `dynamic_tree`; one entropy stands for the
    whole round. ValueError where `sure` is not below `unsure`, and where some depth and width give fewer than `nodes` guesses.
    """

    name = "entropy_tree"

    nodes: Annotated[int, Within(1, MOST_GUESSES)] = 25
    deep: Annotated[int, Within(1, DEEPEST)] = 8
    narrow: Annotated[int, Within(1, WIDEST)] = 3
    shallow: Annotated[int, Within(1, DEEPEST)] = 3
    wide: Annotated[int, Within(1, WIDEST)] = 10
    sure: Annotated[float, Within(0, 100)] = 0.5
    unsure: Annotated[float, Within(0, 100)] = 2.5

    def __post_init__(self) -> None:
        if not 0 <= self.sure < self.unsure:
            raise ValueError(f"entropies need 0 <= sure < unsure, got {self.sure} and {self.unsure}")
        self._check()

    def extents(self) -> list[tuple[int, int]]:
        steps = 4 * (abs(self.deep - self.shallow) + abs(self.wide - self.narrow)) + 1
        return list(dict.fromkeys(self._between(step / steps) for step in range(steps + 1)))

    def extent(self, logits_1V: Tensor) -> tuple[int, int]:
        entropy = float(logits_1V.float().softmax(-1).mul(-logits_1V.float().log_softmax(-1)).nansum())
        return self._between(min(1.0, max(0.0, (entropy - self.sure) / (self.unsure - self.sure))))

    def _between(self, share: float) -> tuple[int, int]:
        """Depth and width, `share` of the way from sure to unsure."""
        depth, width = self.deep + share * (self.shallow - self.deep), self.narrow + share * (self.wide - self.narrow)
        return int(depth + 0.5), int(width + 0.5)
