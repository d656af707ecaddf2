"""Sample frames of untrusted video files, each in a process of its own."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from specvlm.errors import UserError, line, message
from specvlm.models.video_lm import VideoLM
from specvlm.serve.read_process import Limits, answer
from specvlm.session.inputs import Source, clip_of
from specvlm.session.options import Options
from specvlm.video.memory import detached
from specvlm.video.video import Clip, VideoInfo

LONGEST = 2**22  # bytes of what the process tells beside the frames


class Told(BaseModel):
    """What the process says of a clip."""

    model_config = ConfigDict(allow_inf_nan=False)

    shape: tuple[int, int, int, int]
    times: tuple[float, ...]
    fps: float = Field(gt=0)
    total_frames: int = Field(ge=0)
    source_fps: float = Field(gt=0)
    reader: str = Field(max_length=1000)


@cache
def _context() -> Any:
    """The fork server, which has imported what reading needs; None where processes cannot be forked."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["specvlm.serve.read_process"])
    return context


def warm_up() -> None:
    """Start the fork server, whose imports take seconds, without waiting for it."""
    if _context() is not None:
        from multiprocessing.forkserver import ensure_running

        ensure_running()


def read_clip(target: VideoLM, path: Path, options: Options, limits: Limits) -> Clip:
    """Read the frames of a file that the target sees.

    A file that crashes, blocks or exhausts the reader ends its process alone.

    Raises:
        UserError: It cannot be read within the limits. The message does not name the file.
    """
    try:
        if _context() is None:
            clip = clip_of(Source(target, options), path)
            assert isinstance(clip, Clip)  # no file is known
            return detached(clip, "the video")
        return _read(target, path, options, limits)
    except UserError as error:
        raise UserError(message(error).replace(str(path), "the video")) from None


def _read(target: VideoLM, path: Path, options: Options, limits: Limits) -> Clip:
    """Read in a process, which is killed after the time limit."""
    here, there = _context().Pipe()
    process = _context().Process(target=answer, args=(there, str(path), options.reader, limits), daemon=True)
    process.start()
    there.close()
    timer = Timer(limits.seconds, process.kill)
    timer.start()
    try:
        info = VideoInfo(**_heard(here)["info"])
        sampling: dict[str, Any] = {"frames": options.frames, "fps": options.fps}
        here.send(sampling if any(sampling.values()) else target.sampling(info))
        return _clip(here, limits)
    except (EOFError, OSError):
        late = not timer.is_alive()
        what = f"did not end within {limits.seconds:g} s" if late else "crashed"
        raise UserError(f"the video cannot be read: the reader {what}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the video cannot be read: the reader gave no clip") from None
    finally:
        timer.cancel()
        here.close()
        process.kill()
        process.join()
        process.close()


def _heard(here: Any) -> Mapping[str, Any]:
    """What the process tells next. Raises UserError if it tells an error."""
    found = json.loads(here.recv_bytes(LONGEST))
    if "error" in found:
        raise UserError(line(str(found["error"])))
    return dict(found)


def _clip(here: Any, limits: Limits) -> Clip:
    """Receive the frames. Raises ValueError if they are not what was asked for."""
    try:
        told = Told.model_validate(_heard(here))
    except ValidationError:
        raise ValueError from None
    count, channels, *_ = told.shape
    if min(told.shape) < 1 or channels != 3 or count != len(told.times) or math.prod(told.shape) > limits.size:
        raise ValueError
    frames: Tensor = torch.empty(told.shape, dtype=torch.uint8)
    if here.recv_bytes_into(frames.numpy().reshape(-1).data) != frames.numel():
        raise ValueError
    return Clip(frames, told.times, told.fps, "the video", told.total_frames, told.source_fps, (), told.reader)
