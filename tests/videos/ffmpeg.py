"""The ffmpeg tool, and what it shows of a file: every frame, upright, with its time.

This is the truth that readers are compared with. What it means:

- The stream is the one that ffmpeg chooses by itself: the one with most pixels, where being marked default counts as
  5,000,000 of them, and an attached picture (a cover) has 1. `av_find_best_stream`, which players use, may differ.
- Frames that an edit list discards are decoded and not shown. An edit list may show a stretch twice.
- After a cut, decoders drop pictures that refer to frames from before it where they know (RASL pictures of HEVC,
  B-frames of MPEG-2 and MPEG-4, H.264 up to the first key frame or recovery point), and else conceal and show them.
  ffmpeg shows frames that are marked as damaged. A packet that does not decode is skipped, and decoding goes on.
- Each decoded frame is shown once (`-fps_mode passthrough`): none is doubled or dropped for a constant rate.
- Frames are turned and mirrored by the signs of the display matrix; its scale and its shift are ignored. A matrix holds
  until another comes: one in a stream of H.264 stands at the first frame alone.
- A frame's time is its own time stamp. Raw streams have none: frames are spaced by the codec's rate. H.264 in AVI has
  the decoding time alone. Where the clock of a broadcast jumps, ffmpeg goes on as if it had not.
- Only differences of times count: a reader's times start at the first frame shown.
- Pixels are RGB by ffmpeg's own default conversion. One thread decodes: several may lose frames beside damaged ones.
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
