"""The clips that come with specvlm, which `video=…` finds by name."""

import os
from pathlib import Path

from specvlm.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "assets" / "clips"


def names() -> list[str]:
    """List the names of the clips, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.mp4"))


def find_clip(video: str) -> Path:
    """Return the path of the clip with this name. If there is none, return the value as a path, with ~ expanded.

    Raises:
        UserError: There is no such file, and the value has neither a slash nor a suffix, so it looks like a clip's
            name. The message lists the clips.
    """
    if video in names():
        return FOLDER / f"{video}.mp4"
    path = Path(os.path.expanduser(video))
    if not path.exists() and "/" not in video and not path.suffix:
        there = ", ".join(names())
        raise UserError(f"video={video}: no such file or embedded clip; choose from {there}.{did_you_mean(video, names())}")
    return path
