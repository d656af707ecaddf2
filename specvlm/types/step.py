"""A round as it happened."""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from specvlm.types.tree import DraftTree, Verdict
from specvlm.types.video import KeepSet


@dataclass(frozen=True)
class Step:
    """One round as it happened: the guesses, the target's word on them, and what was added to the output.

    Attributes:
        tokens: What the round adds to the output, its stop id included, never past a stop id or the limit. Round 0 is the
            prefill: one token, nothing drafted.
        tree: The guesses as they were checked, on the host; None where nothing was drafted.
        verdict: What the rule made of them, before the output was cut.
        times_s: Seconds by part, of embed, prefill, prune, draft_prefill, draft, verify, and capture where the engine met a
            new shape; they add up to the time since the step before.
        keep: What the drafter sees, in the step that started it.
        attention: (N,) what the target's question attends to, in the same step, where a request asks to `record` it.
        lossless: Does the rule claim to be? What a lossy one accepts says nothing of the target's own choice.
    """

    tokens: tuple[int, ...]
    tree: DraftTree | None = None
    verdict: Verdict | None = None
    times_s: dict[str, float] = field(default_factory=dict)
    keep: KeepSet | None = None
    attention: Tensor | None = None
    lossless: bool = True

    @property
    def drafted(self) -> int:
        """Guesses that were checked."""
        return len(self.tree) - 1 if self.tree else 0

    @property
    def depth(self) -> int:
        """Most guesses on one path."""
        return max(self.tree.depths) if self.tree else 0

    @property
    def accepted(self) -> int:
        """Guesses that the rule took, before the output was cut."""
        return self.verdict.accepted if self.verdict else 0

    @property
    def full(self) -> bool:
        """Was the round's output not cut by a stop id or the limit?"""
        return self.verdict is None or len(self.tokens) == self.verdict.accepted + 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the accepted guesses (`DraftTree.ranks_on`)."""
        return self._ranks_and_widths[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many guesses were tried behind the root, and behind each accepted one."""
        return self._ranks_and_widths[1]

    @cached_property
    def _ranks_and_widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.tree is None or self.verdict is None or not self.lossless:
            return (), ()
        return self.tree.ranks_on(self.verdict.path)

    @property
    def refused(self) -> tuple[int, ...]:
        """Guesses behind the accepted ones that the target did not take (`DraftTree.refused`), of a round that was not cut."""
        return self.tree.refused(self.verdict.path) if self.tree and self.verdict and self.full else ()
