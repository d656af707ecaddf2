"""Share time between prefills and requests that decode."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from specvlm.decoding.ticket import Ticket

STALL_S = 0.06  # seconds that prefills may add to a round of a request that decodes


class Slices:
    """Runs prefills from pause to pause, first come first served, for as long as requests that decode may wait.

    A prefill pauses after each layer and each pass of the vision tower. Its result does not depend on where it is
    interrupted, so neither does the output. While no request decodes, a slice ends after the same time on the host's
    clock, so that new requests are noticed.

    Args:
        stall_s: Seconds that slices may take between two steps of a request that decodes. The first part of a slice
            runs even if it takes longer.
    """

    def __init__(self, stall_s: float = STALL_S) -> None:
        self.stall_s, self._last_s = stall_s, 0.0

    def run(self, live: Sequence[Ticket], on: bool) -> None:
        """Run the slices of one turn.

        Args:
            live: Requests that run.
            on: As in `Ticket.advance`.
        """
        spent = 0.0
        for ticket in live:
            while ticket.resting is not None and not ticket.done:
                others = [other for other in live if other.decodes and not other.done]
                if not self._may_continue(others, spent):
                    return
                if ticket.resting.waits:
                    ticket.advance(on)
                    break
                spent += self._advance(ticket, others, on)

    def _may_continue(self, others: Sequence[Ticket], spent: float) -> bool:
        """Whether no request that decodes has waited too long; if none decodes, whether the slice is still short."""
        stalled = max((other.stalled for other in others), default=spent)
        return not stalled or stalled + self._last_s <= self.stall_s

    def _advance(self, ticket: Ticket, others: Sequence[Ticket], on: bool) -> float:
        """Run a prefill to its next pause, and add the time to `stalled` of those that wait. Returns the seconds."""
        start = perf_counter()
        ticket.advance(on)
        if others and ticket.resting is not None and ticket.resting.device.type == "cuda":
            torch.cuda.synchronize(ticket.resting.device)  # else the host would run ahead
        self._last_s = spent = perf_counter() - start
        for other in others:
            if other is not ticket:
                other.stalled += spent
        return spent
