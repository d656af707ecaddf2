"""Damaged videos by every reader: nothing ends the process, hangs it, or takes a gigabyte more than a good file."""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Iterator
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
# Numbers with which decoders have aborted: a clip, the mark of a field, where behind it, the value.
KNOWN = (
    ("mp4/h264_b/whole", b"stts", 8, struct.pack(">I", 0x7FFFFFFF)),
    ("faststart/h264_b/whole", b"stts", 8, struct.pack(">I", 0xFFFFFFFF)),
    ("avi/mpeg4_b/whole", b"strh", 36, struct.pack("<I", 0x7FFFFFFF)),
)
_ROOM_MB = 1024


def attacks(count: int, seed: int, make: Maker) -> Iterator[tuple[str, str, bytes]]:
    """The name of an attack, the ending of its file's name, its bytes: those that are known first."""
    for clip, mark, offset, value in KNOWN[:count]:
        data = make(CELLS[clip]).read_bytes()
        at = data.index(mark) + len(mark) + offset
        yield f"{clip}, {mark.decode()} {value.hex()}", make(CELLS[clip]).suffix, data[:at] + value + data[at + len(value) :]
    rng = random.Random(seed)
    for number in range(count - len(KNOWN)):
        clip = CLIPS[number % len(CLIPS)]
        path = make(CELLS[clip])
        yield f"{clip}, mutation {number} of seed {seed}", path.suffix, mutate(rng, path.read_bytes())


def run(count: int, seed: int) -> list[str]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder, kinds = Path(name), readers()
        make = Maker(folder)
        good = {reader: survived(make(CELLS[CLIPS[0]]), reader, folder / f"good-{reader}").peak_mb for reader in kinds}
        for number, (attack, suffix, data) in enumerate(attacks(count, seed, make)):
            path = folder / f"{number}{suffix}"
            path.write_bytes(data)
            for reader in kinds:
                verdict = survived(path, reader, folder / f"{number}-{reader}")
                if verdict.peak_mb > good[reader] + _ROOM_MB:
                    found.append(f"{attack}, by {reader}: {verdict.peak_mb:,} MB, {good[reader]:,} for a good file")
                if verdict.kind == "WRONG":
                    found.append(f"{attack}, by {reader}: {verdict}")
            path.unlink()
    return found
