"""Whether a reader shows what ffmpeg shows.

Each judgement runs in a fork, so that a decoder that aborts or hangs is a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from campaign.fork import Child

from videos.ffmpeg import Shown

HANG_S = 10
_SAME = 1.0  # mean difference of two pictures up to which they are the same: neighbouring frames differ by 4.6
_CLOCK = 1.5e-3  # seconds that two times may differ by: Matroska and FLV count milliseconds


@dataclass(frozen=True)
class Verdict:
    """kind: read, refused or WRONG; why: the line of a refusal, or what is wrong."""

    kind: str
    why: str = ""
    peak_mb: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{': ' if self.why else ''}{self.why}"


def readers() -> list[str]:
    """Every reader there is. Imports all that the forks need."""
    import av  # noqa: F401
    import decord  # noqa: F401
    import torch

    import specvlm.video.video  # noqa: F401
    from specvlm.video.readers import NAMES

    torch.set_num_threads(1)  # a fork has none of the other threads
    return list(NAMES)


def judged(path: Path, truth: Shown | str, reader: str, folder: Path) -> Verdict:
    """Read a file and compare with what ffmpeg shows. folder: for the fork, does not exist yet."""
    return _survived(lambda: _compared(path, truth, reader), folder)


def survived(path: Path, reader: str, folder: Path) -> Verdict:
    """Probe a file and read 5 of its frames. Whatever comes is right, as long as the process lives and ends soon."""
    return _survived(lambda: _tried(path, reader), folder)


def _survived(act: Callable[[], Verdict], folder: Path) -> Verdict:
    def action() -> int:
        verdict = act()
        Path("verdict").write_text(f"{verdict.kind}\n{verdict.why}")
        return 0

    ended = Child(action, folder).wait(HANG_S)
    if ended.code is None:
        return Verdict("WRONG", f"hangs for over {HANG_S} s", ended.peak_mb)
    if ended.code:
        return Verdict("WRONG", f"the process ends with {ended.code}: {ended.err.strip()[-200:]!r}", ended.peak_mb)
    kind, why = (folder / "verdict").read_text().split("\n", 1)
    return Verdict(kind, why, ended.peak_mb)


def _tried(path: Path, reader: str) -> Verdict:
    from specvlm.errors import UserError
    from specvlm.video.video import probe, read_video

    try:
        info = probe(path, reader)
        clip = read_video(path, frames=min(5, info.frames), reader=reader)
    except UserError as error:
        return Verdict("refused", str(error)) if "\n" not in str(error) else Verdict("WRONG", f"not one line: {error}")
    numbers = (*clip.times, clip.source_fps, clip.fps, info.fps, info.duration)
    if not all(map(math.isfinite, numbers)) or list(clip.times) != sorted(clip.times):
        return Verdict("WRONG", f"times or rates that cannot be: {numbers}")
    return Verdict("read")


def _compared(path: Path, truth: Shown | str, reader: str) -> Verdict:
    from specvlm.errors import UserError
    from specvlm.video.video import read_video

    try:
        clip = read_video(path, reader=reader)
    except UserError as error:
        return Verdict("refused", str(error)) if "\n" not in str(error) else Verdict("WRONG", f"not one line: {error}")
    if isinstance(truth, str):
        return Verdict("WRONG", f"{len(clip.times)} frames of a file of which ffmpeg shows nothing ({truth})")
    faults = list(_faults(path, truth, reader, clip))
    return Verdict("WRONG", "; ".join(faults)) if faults else Verdict("read")


def _faults(path: Path, truth: Shown, reader: str, clip: Any) -> Iterator[str]:
    frames = clip.frames.permute(0, 2, 3, 1).numpy()
    yield from _pictures(frames, truth.frames)
    yield from _clock(clip.times, truth.times)
    yield from _rates(path, truth, reader, clip)
    yield from _samples(path, reader, frames, clip)


def _pictures(frames: np.ndarray, expected: np.ndarray) -> Iterator[str]:
    if frames.shape[1:] != expected.shape[1:]:
        yield f"pictures of {frames.shape[2]}x{frames.shape[1]}, not {expected.shape[2]}x{expected.shape[1]}"
    elif len(frames) != len(expected):
        yield f"{len(frames)} frames, not {len(expected)}: {numbers(frames)}, not {numbers(expected)}"
    else:
        apart = np.abs(frames.astype(int) - expected).mean((1, 2, 3))
        if (apart > _SAME).any():
            yield f"{(apart > _SAME).sum()} of {len(frames)} frames are others: {numbers(frames)}, not {numbers(expected)}"


def numbers(frames: np.ndarray) -> str:
    """Frames by the number that their lower right corner shows, as runs."""
    shown = [round(float((frame[-8:, -8:, 0].mean() * 219 / 255 + 16 - 20) / 4)) for frame in frames]
    starts = [at for at, number in enumerate(shown) if not at or number != shown[at - 1] + 1]
    runs = [(shown[start], shown[end - 1]) for start, end in zip(starts, [*starts[1:], len(shown)], strict=True)]
    return " ".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs)[:120]


def _clock(times: tuple[float, ...], expected: tuple[float | None, ...]) -> Iterator[str]:
    if not all(map(math.isfinite, times)) or list(times) != sorted(times):
        yield f"times that do not ascend: {_brief(times)}"
    elif len(times) == len(expected) and _ascend(expected):
        right = [time - expected[0] for time in expected]
        if any(abs(time - times[0] - wanted) > _CLOCK for time, wanted in zip(times, right, strict=True)):
            yield f"times {_brief(times)}, not {_brief(right)}"


def _ascend(times: tuple[float | None, ...]) -> bool:
    return None not in times and list(times) == sorted(times)


def _brief(times: Any) -> str:
    return " ".join(f"{time:.3f}" for time in times[:4]) + f" … {times[-1]:.3f}"


def _rates(path: Path, truth: Shown, reader: str, clip: Any) -> Iterator[str]:
    from specvlm.video.video import probe

    info = probe(path, reader)
    height, width = truth.frames.shape[1:3]
    if (info.frames, info.width, info.height) != (len(truth.frames), width, height):
        yield f"probe says {info.frames} frames of {info.width}x{info.height}"
    if not _ascend(truth.times) or truth.times[-1] == truth.times[0]:
        return
    rate = (len(truth.times) - 1) / (truth.times[-1] - truth.times[0])
    for name, value, right in (
        ("source_fps", clip.source_fps, rate),
        ("probe's fps", info.fps, rate),
        ("probe's duration", info.duration, len(truth.frames) / rate),
    ):
        if not abs(value - right) <= 0.01 * right:
            yield f"{name} {value:.4g}, not {right:.4g}"


def _samples(path: Path, reader: str, frames: np.ndarray, clip: Any) -> Iterator[str]:
    from specvlm.video.video import read_video

    for count in sorted({min(5, len(frames)), min(13, len(frames))}):
        some = read_video(path, frames=count, reader=reader, sampling="endpoints")
        if some.index[-1] >= len(frames):
            yield f"of {count} frames the last is number {some.index[-1]}, where reading all gives {len(frames)}"
            continue
        seen, whole = some.frames.permute(0, 2, 3, 1).numpy(), frames[list(some.index)]
        if not np.array_equal(seen, whole):
            yield f"of {count} frames not those of reading all: {numbers(seen)}, not {numbers(whole)}"
        if any(abs(time - clip.times[place]) > 1e-6 for time, place in zip(some.times, some.index, strict=True)):
            yield f"of {count} frames other times than of all"
