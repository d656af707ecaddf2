"""Read videos, each in a process of its own with limits on memory and time: `python -m specvlm.serve.read_process FD`.

The command starts a process that imports what reading needs, once, and has no threads. It forks for each video. The
fork server of `multiprocessing` would import the main program again in each child.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import torch

from specvlm.errors import UserError, first_line, message
from specvlm.video.av_file import container_of
from specvlm.video.video import MAX_FRAMES, VideoInfo, probe, read_video

LONGEST = 2**16  # bytes of a message
SPARE = 2 * 2**30  # bytes that reading may take beyond twice those of the frames
# Fields of a clip, besides its frames, that the child may send.
TOLD = ("times", "fps", "total_frames", "source_fps", "reader")


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


def serve(control: socket.socket) -> None:
    """Fork a child for each message, until the other end is closed. A message carries the child's connection."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children need not be waited for
    while True:
        message, given, _, _ = socket.recv_fds(control, LONGEST, 1)
        if not message:
            return
        if os.fork():
            os.close(given[0])
            continue
        try:
            control.close()
            asked = json.loads(message)
            answer(Connection(given[0]), asked["path"], asked["reader"], Limits(**asked["limits"]))
        finally:
            os._exit(0)


def answer(connection: Connection, path: str, reader: str, limits: Limits) -> None:
    """Send a description of the video, receive how to sample it, and send its frames, or an error. Runs in the child.

    Sends only JSON and plain bytes, so that the receiver need not trust a process that a file may have taken over.
    """
    try:
        _limit(limits)
        info = described(Path(path), reader, limits)
        connection.send_bytes(json.dumps({"info": asdict(info)}).encode())
        clip = read_video(path, reader=reader, **bounded(info, connection.recv(), limits))
        told: dict[str, Any] = {name: getattr(clip, name) for name in TOLD}
        connection.send_bytes(json.dumps(told | {"shape": list(clip.frames.shape)}).encode())
        connection.send_bytes(clip.frames.contiguous().numpy().reshape(-1).data)
    except UserError as error:
        _say(connection, message(error))
    except MemoryError:
        _say(connection, "the video takes too much memory to read")
    except Exception as error:
        _say(connection, f"the video cannot be read ({first_line(error)})")


def described(path: Path, reader: str, limits: Limits) -> VideoInfo:
    """Describe a video. Checks the size of its frames before any is decoded."""
    with suppress(av.FFmpegError, OSError, ValueError), container_of(path) as container:
        for stream in container.streams.video:
            _check_size(stream.codec_context.width, stream.codec_context.height, limits)
    info = probe(path, reader)
    _check_size(info.width, info.height, limits)
    return info


def bounded(info: VideoInfo, sampling: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Lower `max_frames` of a request's sampling to the limit.

    Args:
        info: Description of the video.
        sampling: Arguments of `read_video` that say which frames to read.
        limits: Bounds of the video.

    Returns:
        The arguments to read with.

    Raises:
        UserError: There would be too many frames, or too many bytes of them.
    """
    most = min(sampling.get("max_frames", MAX_FRAMES), limits.frames)
    count = sampling.get("frames") or min(most, int(info.duration * sampling.get("fps", info.fps)) + 4, info.frames)
    if count > limits.frames:
        raise UserError(f"{count} frames, but at most {limits.frames} are allowed: ask for fewer")
    if count * info.width * info.height * 3 > limits.size:
        told = f"{count} frames of {info.width}x{info.height} take more than {limits.size / 2**20:.0f} MiB"
        raise UserError(f"{told}: ask for fewer, or send a smaller video")
    return sampling | {"max_frames": max(1, most)}


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise UserError(f"frames of {width}x{height}: at most {limits.pixels:,} pixels are allowed")


def _say(connection: Connection, error: str) -> None:
    with suppress(OSError):
        connection.send_bytes(json.dumps({"error": error}).encode())


def _limit(limits: Limits) -> None:
    """Limit memory and time of this process."""
    import resource

    import psutil

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)  # ends this process in any case
    seconds = int(2 * limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = psutil.Process().memory_info().vms + 2 * limits.size + SPARE
    with suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        serve(end)
