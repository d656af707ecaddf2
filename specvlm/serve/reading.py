"""Sample frames of untrusted video files within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specvlm.errors import UserError, message
from specvlm.models.video_lm import VideoLM
from specvlm.session.inputs import clip_of
from specvlm.session.options import Options
from specvlm.video.memory import detached
from specvlm.video.video import Clip


@dataclass(frozen=True)
class Limits:
    """Bounds of a video.

    Attributes:
        frames: Most frames sampled.
        pixels: Most pixels of a frame.
        size: Most bytes of the sampled frames.
        seconds: Time in which it must be read.
    """

    frames: int
    pixels: int
    size: int
    seconds: float


def read_clip(target: VideoLM, path: Path, options: Options, limits: Limits) -> Clip:
    """Read the frames of a file that the target sees. Raises UserError, without the file's path."""
    try:
        return detached(clip_of(target, path, options), "the video")
    except UserError as error:
        raise UserError(message(error).replace(str(path), "the video")) from None
