"""Keep what the drafter saw of recent requests that asked for it: frames, and the tokens kept in each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from specvlm.results.thumbnails import bits, data_uri, picture
from specvlm.types import KeepSet, TokenGrid
from specvlm.video.video import SAMPLINGS, Clip

MOST_VIEWS, MOST_FRAMES = 32, 64  # requests that are kept; pictures of a request


class Views:
    """The views of the latest requests, by the id of their completion, which cannot be guessed."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def put(self, name: str, view: dict[str, Any]) -> None:
        """Keep a view; drops the oldest one if there are too many."""
        self._found[name] = view
        while len(self._found) > MOST_VIEWS:
            self._found.popitem(last=False)

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a view, if it is still kept."""
        return self._found.get(name)


def view_of(clips: Sequence[Clip], grids: Sequence[TokenGrid]) -> dict[str, Any]:
    """Describe the videos of a request, before it is known what the drafter sees.

    A grid's frame may stand for several frames of the clip; its picture is the first of them.
    """
    videos = []
    for clip, grid in zip(clips, grids, strict=True):
        shown = SAMPLINGS["uniform"](grid.frames, min(MOST_FRAMES // max(1, len(clips)) or 1, grid.frames))
        frames = [place * len(clip.frames) // grid.frames for place in shown]
        videos.append(
            {
                "grid": [grid.frames, grid.height, grid.width, grid.newline],
                "shown": shown,
                "seconds": [clip.times[place] for place in frames],
                "frames": [data_uri(picture(clip.frames[place])) for place in frames],
            }
        )
    return {"videos": videos, "kept": None}


def with_kept(view: dict[str, Any], keep: KeepSet, grids: Sequence[TokenGrid]) -> None:
    """Add what the drafter saw to a view: the tokens kept of each video as bits, and their number in each frame."""
    index, start = keep.index.cpu().numpy(), 0
    kept = []
    for grid in grids:
        mine = index[(index >= start) & (index < start + len(grid))] - start
        counts = np.bincount(mine[mine < grid.cells] // max(1, grid.per_frame), minlength=grid.frames)
        kept.append({"bits": bits(mine.tolist(), len(grid)), "per_frame": counts.tolist(), "tokens": len(mine)})
        start += len(grid)
    view["kept"] = kept
