"""The clips that travel with specvlm, and how `video=…` finds one."""

from __future__ import annotations

import json
from pathlib import Path

from specvlm.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "assets" / "clips"
QUESTION = "describe the video."


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.mp4"))


def find_clip(video: str) -> tuple[str, Path, str]:
    """Name, file and default question of a file, or of an embedded clip. Raises UserError naming what there is."""
    if video in names():
        about = FOLDER / "clips.json"
        clips = json.loads(about.read_text()) if about.is_file() else {}
        return video, FOLDER / f"{video}.mp4", clips.get(video, {}).get("question", QUESTION)
    path = Path(video).expanduser()
    if not path.exists() and "/" not in video and not path.suffix:
        raise UserError(
            f"video={video}: no such file, and no embedded clip; there is {', '.join(names())}.{did_you_mean(video, names())}"
        )
    return path.name, path, QUESTION
