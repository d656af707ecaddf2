"""The ffmpeg tool, and what it shows of a file: every frame, upright, with its time.

This is the truth that readers are compared with. What it means:

- The stream is the one that ffmpeg chooses by itself: most pixels, where a stream marked default counts 5,000,000 more, and
  a cover (attached picture) counts 1.
- Frames that an edit list discards are decoded and not shown. Pictures that refer to some from before a cut are dropped by
  the decoder where it knows (HEVC's RASL, MPEG-2's and MPEG-4's B-frames), and shown, however broken, where it does not.
- Each decoded frame is shown once (`-fps_mode passthrough`): none is doubled or dropped for a constant rate.
- Frames are turned and mirrored as the display matrix says, with the scale and the shift of the matrix ignored.
- The time of a frame is its own time stamp; where a file has none, ffmpeg's guess from the frames before. Jumps of a broadcast's
  clock are taken out. Only differences count: a reader's times start at the first frame shown.
- Pixels are RGB by ffmpeg's own default conversion.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CLOCK = re.compile(r"config in time_base: (\d+)/(\d+)")
_FRAME = re.compile(r"\] n: *\d+ pts: *(NOPTS|-?\d+) .* s:(\d+)x(\d+) ")


@dataclass(frozen=True, eq=False)
class Shown:
    """frames (T, H, W, 3), uint8; times: seconds of each, None where ffmpeg gives none."""

    frames: NDArray[np.uint8]
    times: tuple[float | None, ...]


@cache
def binary() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*words: object, level: str = "error", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg; standard output and error come back as bytes. With `check`, a failure raises CalledProcessError."""
    command = [binary(), "-hide_banner", "-nostdin", "-y", "-v", level, "-threads", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=check, timeout=60)


def shown(path: Path) -> Shown | str:
    """What ffmpeg shows, or the last line that it says where it shows nothing."""
    raw = ("-an", "-sn", "-dn", "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24")
    done = ffmpeg("-max_error_rate", 1, "-i", path, *raw, "-", level="info", check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    times, sizes, clock = [], set(), Fraction(1)
    for line in lines:
        if found := _CLOCK.search(line):
            clock = Fraction(int(found[1]), int(found[2]))
        elif found := _FRAME.search(line):
            times.append(None if found[1] == "NOPTS" else float(int(found[1]) * clock))
            sizes.add((int(found[3]), int(found[2])))
    if len(sizes) != 1:
        return f"{len(sizes)} picture sizes" if sizes else lines[-1]
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, *sizes.pop(), 3)
    assert len(frames) == len(times), f"{path}: {len(frames)} frames, {len(times)} times"
    return Shown(frames, tuple(times))
