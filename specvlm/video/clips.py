"""The clips that travel with specvlm, and how `video=…` finds one."""

import os
from pathlib import Path

from specvlm.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "assets" / "clips"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.mp4"))


def find_clip(video: str) -> Path:
    """A file, or an embedded clip by name. Raises UserError naming what there is for something that looks like a name."""
    if video in names():
        return FOLDER / f"{video}.mp4"
    path = Path(os.path.expanduser(video))
    if not path.exists() and "/" not in video and not path.suffix:
        there = ", ".join(names())
        raise UserError(f"video={video}: no such file, and no embedded clip; there is {there}.{did_you_mean(video, names())}")
    return path
