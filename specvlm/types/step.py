"""A round as it happened."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from specvlm.types.tree import DraftTree
from specvlm.types.video import KeepSet


@dataclass(frozen=True)
class Step:
    """One round as it happened. tokens: what it adds to the output, stop id included, never past a stop id or the limit.

    Round 0 is the prefill: one token, nothing drafted. drafted: guesses checked, depth: most of them on one path;
    accepted: how many the verifier took (before the output was cut); full: False when a stop id or the limit cut it.
    ranks, widths: of the accepted guesses, and how many were tried behind the root and behind each (`DraftTree.ranks_on`).
    refused: guesses behind the accepted ones that the target did not take (`DraftTree.refused`), of rounds that were not cut.
    times_s: seconds by part, of embed, prefill, prune, draft_prefill, draft, verify, and capture where the engine met a new
    shape; they add up to the time since the step before. keep: what the drafter sees, in the step that started it;
    attention: (N,) what the target's question attends to, in the same step, where `DecodingGraph.record` asks for it.
    tree: the guesses as they were checked, on the host; None where nothing was drafted.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    depth: int = 0
    accepted: int = 0
    full: bool = True
    times_s: dict[str, float] = field(default_factory=dict)
    keep: KeepSet | None = None
    ranks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    attention: Tensor | None = None
    tree: DraftTree | None = None
