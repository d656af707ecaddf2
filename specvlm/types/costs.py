"""Measured times of a round that several requests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from typing_extensions import TypedDict

from specvlm.parsing.bounds import Within, parse
from specvlm.parsing.files import json_of, read_text
from specvlm.types.tree import TreeShape

Count = Annotated[int, Within(0, 1_000_000)]
Milliseconds = Annotated[float, Within(0, 1e9)]


@dataclass(frozen=True)
class RoundCost:
    """Measured times of a decoding round in ms, and the sizes that they were measured for.

    Attributes:
        requests: Number of requests that share the round.
        rows: Rows of the target's pass, over all requests.
        passes: Number of draft passes, which run one after another.
        draft_rows: Rows of all these passes together, over all requests.
        draft_ms: Time of drafting.
        check_ms: Time of the target's pass, and of the host.
        ratio: Share of the video tokens that the draft does not see; 0 without a draft.
    """

    requests: Annotated[int, Within(1, 4096)]
    rows: Count
    passes: Count
    draft_rows: Count
    draft_ms: Milliseconds
    check_ms: Milliseconds
    ratio: Annotated[float, Within(0, 1)] = 0.0

    @classmethod
    def of_shape(cls, shape: TreeShape, requests: int, draft_ms: float, check_ms: float, ratio: float = 0.0) -> RoundCost:
        """Make the cost of a round in which each request has a tree of this shape."""
        passes, rows, draft_rows = sizes_of_round(shape)
        return cls(requests, rows * requests, passes, draft_rows * requests, draft_ms, check_ms, ratio)


def sizes_of_round(shape: TreeShape) -> tuple[int, int, int]:
    """Count a request's draft passes, the rows of the target's pass, and the rows of all draft passes together."""
    return len(shape.levels), len(shape), sum(map(len, shape.levels))


class _Timing(TypedDict):
    """A measured shape in costs.json."""

    drafter: str
    shape: str
    draft_ms: Milliseconds
    check_ms: Milliseconds
    ratio: Annotated[float, Within(0, 1)]


class _Profile(TypedDict):
    """The keys of costs.json that `read_costs` reads."""

    alone_ms: Milliseconds
    timings: list[_Timing]
    shared: NotRequired[list[RoundCost]]


def read_costs(path: Path, drafter: str) -> tuple[RoundCost, ...]:
    """Read a drafter's costs from the costs.json of `python -m specvlm.advise`.

    Args:
        path: The file.
        drafter: Name of the drafter.

    Returns:
        The cost of a round without drafting; those of the drafter's trees; and those of rounds that several requests
        share, with drafting only for the drafter `tree`. Costs with drafting are those of one ratio, the highest below
        1 that was measured for the drafter.

    Raises:
        ValueError: The file or a tree shape in it is invalid.
        OSError: The file cannot be read.
    """
    found: _Profile = parse(_Profile, json_of(read_text(path)), f"costs={path}")
    rounds = [RoundCost(1, 1, 0, 0, 0.0, found["alone_ms"])]
    mine = [one for one in found["timings"] if one["drafter"] == drafter]
    # Only costs at one ratio: rounds at another ratio take other times.
    ratio = max((one["ratio"] for one in mine if one["ratio"] < 1), default=None)
    for one in mine:
        if one["ratio"] == ratio:
            times = one["draft_ms"], one["check_ms"], one["ratio"]
            rounds.append(RoundCost.of_shape(TreeShape.parse(one["shape"]), 1, *times))
    shared = (one for one in found.get("shared", ()) if not one.passes or (drafter == "tree" and one.ratio == ratio))
    return (*rounds, *shared)
