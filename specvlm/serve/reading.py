"""Sample frames of untrusted video files, each in a process of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from specvlm.errors import UserError, line, message
from specvlm.models.video_lm import VideoLM
from specvlm.serve.read_process import Limits
from specvlm.session.inputs import Source, clip_of
from specvlm.session.options import Options
from specvlm.video.memory import detached
from specvlm.video.video import Clip, VideoInfo

LONGEST = 2**22  # bytes of a message of the process, frames aside
STARTING_S = 60.0  # seconds that the first video may wait for the process to start


class Told(BaseModel):
    """Description of a clip as the process sends it, checked since the process is not trusted."""

    model_config = ConfigDict(allow_inf_nan=False)

    shape: tuple[int, int, int, int]
    times: tuple[float, ...]
    fps: float = Field(gt=0)
    total_frames: int = Field(ge=0)
    source_fps: float = Field(gt=0)
    reader: str = Field(max_length=1000)


class ReadServer:
    """The process that forks for each video (see `read_process`). It is started again if it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._starting = Lock()

    @property
    def works_here(self) -> bool:
        """Whether this system can fork, and send open files to other processes."""
        return sys.platform == "linux"

    def start(self) -> socket.socket:
        """Start the process unless it runs, and return the socket to it. Does not wait for its slow imports."""
        with self._starting:
            if self._control is None or self._process is None or self._process.poll() is not None:
                self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
                command = [sys.executable, "-m", "specvlm.serve.read_process", str(theirs.fileno())]
                env, files = os.environ | {"PYTHONPATH": path}, [theirs.fileno()]
                given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
                self._process = subprocess.Popen(command, env=env, pass_fds=files, **given)
                theirs.close()
            return self._control

    def stop(self) -> None:
        """End the process and all its forks, so that no thread waits for a video any more."""
        with self._starting:
            if self._process is not None and self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def ask(self, path: Path, reader: str, limits: Limits) -> Connection:
        """Begin to read a video. Returns the connection to the process that reads it."""
        ours, theirs = socket.socketpair()
        with theirs:
            message = {"path": str(path), "reader": reader, "limits": asdict(limits)}
            socket.send_fds(self.start(), [json.dumps(message).encode()], [theirs.fileno()])
        return Connection(ours.detach())


SERVER = ReadServer()


def read_clip(target: VideoLM, path: Path, options: Options, limits: Limits) -> Clip:
    """Read a video file, and sample the frames that the target sees.

    A file that crashes, blocks or exhausts the reader only ends the reader's process.

    Raises:
        UserError: The file cannot be read within the limits. The message does not name it.
    """
    try:
        if not SERVER.works_here:
            clip = clip_of(Source(target, options), path)
            assert isinstance(clip, Clip)  # no file is known
            return detached(clip, "the video")
        return _read(target, path, options, limits)
    except UserError as error:
        raise UserError(message(error).replace(str(path), "the video")) from None


def _read(target: VideoLM, path: Path, options: Options, limits: Limits) -> Clip:
    """Read in a process, which ends at the time limit."""
    end = monotonic() + limits.seconds
    try:
        with SERVER.ask(path.absolute(), options.reader, limits) as here:
            if not here.poll(limits.seconds + STARTING_S):
                raise TimeoutError
            info = VideoInfo(**_received(here)["info"])
            sampling: dict[str, Any] = {"frames": options.frames, "fps": options.fps}
            here.send(sampling if any(sampling.values()) else target.sampling(info))
            return _clip(here, limits)
    except (EOFError, OSError):
        what = f"did not end within {limits.seconds:g} s" if monotonic() >= end else "crashed"
        raise UserError(f"the video cannot be read: the reader {what}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the video cannot be read: the reader sent no clip") from None


def _received(here: Any) -> Mapping[str, Any]:
    """Receive the next message. Raises UserError if it is an error."""
    found = json.loads(here.recv_bytes(LONGEST))
    if "error" in found:
        raise UserError(line(str(found["error"])))
    return dict(found)


def _clip(here: Any, limits: Limits) -> Clip:
    """Receive the frames. Raises ValueError if their description or their size is invalid."""
    try:
        told = Told.model_validate(_received(here))
    except ValidationError:
        raise ValueError from None
    count, channels, *_ = told.shape
    if min(told.shape) < 1 or channels != 3 or count != len(told.times) or math.prod(told.shape) > limits.size:
        raise ValueError
    frames: Tensor = torch.empty(told.shape, dtype=torch.uint8)
    if here.recv_bytes_into(frames.numpy().reshape(-1).data) != frames.numel():
        raise ValueError
    return Clip(frames, told.times, told.fps, "the video", told.total_frames, told.source_fps, (), told.reader)
