"""Damaged videos by every reader: nothing ends the process, hangs it, or takes a gigabyte more than a good file."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from videos.cells import CELLS
from videos.edits import Maker
from videos.judge import readers, survived
from videos.mutate import mutate

COUNT, SAMPLE = 100, 6

CLIPS = (
    *("mp4/h264_b/whole", "mp4/h264_long/cut", "faststart/h264_b/whole", "fragmented/h264_b/whole", "mov/mjpeg/whole"),
    *("mp4/h264_b/turn90", "mkv/h264_b/whole", "webm/vp9/whole", "avi/mpeg4_b/whole", "avi/xvid_packed/whole"),
    *("ts/h264_b/whole", "wmv/wmv2/whole", "flv/h264_b/whole", "gif/gif/whole", "ogv/theora/whole"),
)
_ROOM_MB = 1024


def run(count: int, seed: int) -> list[str]:
    found, rng = [], random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, kinds = Path(name), readers()
        make = Maker(folder)
        good = {reader: survived(make(CELLS[CLIPS[0]]), reader, folder / f"good-{reader}").peak_mb for reader in kinds}
        for number in range(count):
            clip = CELLS[CLIPS[number % len(CLIPS)]]
            path = folder / f"{number}{make(clip).suffix}"
            path.write_bytes(mutate(rng, make(clip).read_bytes()))
            for reader in kinds:
                verdict = survived(path, reader, folder / f"{number}-{reader}")
                if verdict.peak_mb > good[reader] + _ROOM_MB:
                    found.append(f"{clip}, mutation {number} by {reader}: {verdict.peak_mb:,} MB, {good[reader]:,} for a good file")
                if verdict.kind == "WRONG":
                    found.append(f"{clip}, mutation {number} by {reader}: {verdict}")
            path.unlink()
    return found
