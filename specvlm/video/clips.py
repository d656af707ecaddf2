"""The clips that come with specvlm, which `video=…` finds by name."""

import os
from pathlib import Path

from specvlm.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "assets" / "clips"


def names() -> list[str]:
    """List the names of the clips."""
    return sorted(path.stem for path in FOLDER.glob("*.mp4"))


def find_clip(video: str) -> Path:
    """Resolve a value of `video=` to a clip by name, or else to a path.

    Raises:
        UserError: There is no such file, and the value looks like a name. The message lists the clips.
    """
    if video in names():
        return FOLDER / f"{video}.mp4"
    path = Path(os.path.expanduser(video))
    if not path.exists() and "/" not in video and not path.suffix:
        there = ", ".join(names())
        raise UserError(f"video={video}: no such file, and no embedded clip; there is {there}.{did_you_mean(video, names())}")
    return path
