"""How long it takes to read frames of a film, by reader: each figure from a process of its own, the best of several.

    python -m experiments.reading FILM --frames 32,128 --out rows.jsonl

decord is called directly, with its own threads on; the others through specvlm. Frames are compared with those of decoding
the film from start to end. Memory is the process's peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from specvlm.video.readers import _cores
from specvlm.video.video import read_video

READERS = ("decord", "auto")
ROWS = Path(__file__).with_name("rows.jsonl")


def read(film: str, reader: str, frames: int) -> dict[str, Any]:
    """One reading, in this process."""
    start = perf_counter()
    if reader == "decord":
        import decord

        video = decord.VideoReader(film)
        total = len(video)
        pixels = video.get_batch([place * total // frames for place in range(frames)]).asnumpy().transpose(0, 3, 1, 2)
    else:
        pixels = read_video(film, frames=frames, reader=reader).frames.numpy()
    seconds = perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss is that of the parent, where it was more
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"seconds": round(seconds, 3), "peak_mib": round(peak), "sha256": digest(pixels)}


def digest(pixels: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]


def sequential(film: str, counts: Sequence[int]) -> dict[int, str]:
    """The digest of as many frames, of decoding from start to end with nothing passed over."""
    import av

    with av.open(film) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    wanted = {count: [place * total // count for place in range(count)] for count in counts}
    kept = {}
    with av.open(film) as container:
        container.streams.video[0].thread_type = "AUTO"
        for place, frame in enumerate(container.decode(video=0)):
            if any(place in places for places in wanted.values()):
                kept[place] = frame.to_ndarray(format="rgb24").transpose(2, 0, 1)
    return {count: digest(np.stack([kept[place] for place in places])) for count, places in wanted.items()}


def rows(film: str, counts: Sequence[int], times: int) -> Iterator[dict[str, Any]]:
    truth = sequential(film, counts)
    for count in counts:
        found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
        for _ in range(times):  # in turn, so that what else the machine does hits both
            for reader in READERS:
                command = [sys.executable, "-m", "experiments.reading", film, "--once", reader, "--frames", str(count)]
                found[reader].append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
        for reader, runs in found.items():
            best = min(runs, key=lambda run: run["seconds"])
            exact = all(run["sha256"] == truth[count] for run in runs)
            of = {"film": Path(film).name, "frames": count, "reader": reader, "cores": _cores(), "cpu": cpu()}
            of |= {"all_seconds": [run["seconds"] for run in runs], "equal_to_sequential": exact, "torch": torch.__version__}
            yield of | {key: best[key] for key in ("seconds", "peak_mib")}


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.reading", description="Time the readers on a film.")
    parser.add_argument("film")
    parser.add_argument("--frames", default="32,128", help="how many, evenly spaced (default %(default)s)")
    parser.add_argument("--times", type=int, default=3, help="each reading's best of so many (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROWS, help="rows are appended here")
    parser.add_argument("--once", choices=READERS, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    counts = [int(count) for count in asked.frames.split(",")]
    if asked.once:
        print(json.dumps(read(asked.film, asked.once, counts[0])))
        return os.EX_OK
    for row in rows(asked.film, counts, asked.times):
        print(f"{row['film']} {row['frames']:>4} {row['reader']:>7}: {row['seconds']:6.2f} s, peak {row['peak_mib']:,} MiB, "
              f"{'equal to' if row['equal_to_sequential'] else 'NOT'} sequential decoding, {row['cores']} cores")  # fmt: skip
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
