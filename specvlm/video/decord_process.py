"""Run decord in a separate process, since it aborts or hangs on some damaged files. Here that raises DecordFailed.

The process runs this file as a script. The file imports neither torch nor specvlm, so that the process starts quickly.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Timer
from typing import IO, Any, ClassVar

import numpy as np

PATIENCE = 60.0  # seconds to wait for a part of an answer; after that the process counts as hanging and is killed
LENGTH = 8  # bytes of the number that precedes each JSON answer and gives its length


class DecordFailed(Exception):
    """decord cannot be used for a file; the message says why in a few words."""


class DecordProcess:
    """Client of the decord process, which serves all files. The next request after a crash or fork starts a new one."""

    _shared: ClassVar[DecordProcess | None] = None

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._owner = os.getpid()

    @classmethod
    def shared(cls) -> DecordProcess:
        """Return the client that all readers of this Python process share."""
        if cls._shared is None or cls._shared._owner != os.getpid():
            cls._shared = cls()
            atexit.register(cls._shared.end)
        return cls._shared

    def open(self, path: Path) -> tuple[list[float], float]:
        """Return the time in seconds of each frame that decord lists, and the frame rate per second.

        Raises DecordFailed if decord cannot open the file or finds no frames in it, crashes or hangs.
        """
        with self._lock, self._in_step():
            self._ask({"path": os.path.abspath(path)})
            said = self._hear()
        if not said["times"]:
            raise DecordFailed("decord finds no frames")
        return [float(time) for time in said["times"]], float(said["fps"])

    def frames(self, path: Path, index: Sequence[int]) -> Generator[np.ndarray[Any, Any], None, None]:
        """Yield the frames with these numbers, each (H, W, 3) uint8 RGB.

        Raises DecordFailed if decord cannot read a frame, crashes or hangs.
        """
        with self._lock, self._in_step():
            self._ask({"path": os.path.abspath(path), "index": list(index)})
            for _ in index:
                height, width, colours = self._hear()["shape"]
                yield np.frombuffer(self._read(height * width * colours), np.uint8).reshape(height, width, colours)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Kill the process if the block is left before the whole answer is read, by an exception or a closed generator.

        The rest of the answer would be taken for the next one.
        """
        try:
            yield
        except DecordFailed:
            raise
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill the process. The next request starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _ask(self, words: dict[str, Any]) -> None:
        """Send a request, as JSON on one line. Starts the process first if it is not running."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-P", __file__]  # -P: import nothing from this file's folder
            pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
            # A new session keeps Ctrl-C in a terminal away from the process.
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, start_new_session=True)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._died()

    def _hear(self) -> dict[str, Any]:
        """Read a JSON answer. Raises DecordFailed if it reports a failure, or the process crashes or hangs."""
        said: dict[str, Any] = json.loads(self._read(int.from_bytes(self._read(LENGTH), "big")))
        if "failed" in said:
            raise DecordFailed(str(said["failed"]))
        return said

    def _read(self, count: int) -> bytes:
        """Read `count` bytes of the process's output. Raises DecordFailed if it dies first, or hangs and is killed."""
        process = self._process
        assert process is not None and process.stdout is not None
        watch = Timer(PATIENCE, process.kill)
        watch.start()
        try:
            data = process.stdout.read(count)
        finally:
            watch.cancel()
        if len(data) < count:
            self._died()
        return data

    def _died(self) -> None:
        """Raise DecordFailed, with the exit code or signal of the process, which has ended."""
        code = self._process.wait() if self._process else 0
        self.end()
        raise DecordFailed(f"the file crashed decord's process ({f'signal {-code}' if code < 0 else f'exit code {code}'})")


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Main loop of the process: answer requests until the input ends. Each request is a JSON object on one line."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    path, video = None, None
    for line in questions:
        asked = json.loads(line)
        try:
            if asked["path"] != path or "index" not in asked:
                path, video = asked["path"], None
                video = decord.VideoReader(path)
            assert video is not None
            if "index" in asked:
                for place in asked["index"]:
                    picture = video[place].asnumpy()
                    _say(answers, {"shape": picture.shape}, picture.tobytes())
            else:
                spans = video.get_frame_timestamp(list(range(len(video))))
                _say(answers, {"times": spans[:, 0].tolist() if len(spans) else [], "fps": video.get_avg_fps()})
        except Exception as error:
            path = None
            _say(answers, {"failed": _reason(error)})


def _say(answers: IO[bytes], words: dict[str, Any], data: bytes = b"") -> None:
    """Send an answer: the length of its JSON, the JSON, and `data`, which holds the pixels of a frame."""
    text = json.dumps(words).encode()
    answers.write(len(text).to_bytes(LENGTH, "big") + text + data)
    answers.flush()


def _reason(error: Exception) -> str:
    """Explain an error of decord in a few words. Known errors are recognised by a part of their message."""
    if "st_nb" in str(error):
        return "decord finds no video stream that it can decode, and has no AV1"
    if "frame-count" in str(error):
        return "decord cannot index this format"
    return "decord cannot read it"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as kept:  # decord prints to stdout: send that to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        serve(sys.stdin.buffer, kept)
