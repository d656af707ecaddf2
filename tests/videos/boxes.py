"""MP4 boxes (ISO/IEC 14496-12, 4.2): find them, and put others in their place."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"moof", b"traf", b"mvex", b"dinf")


@dataclass(frozen=True)
class Box:
    """kind: four letters; start and end: of the box with its header of eight bytes; folders: where it lies in."""

    kind: bytes
    start: int
    end: int
    folders: tuple[Box, ...] = ()


def boxes(data: bytes, start: int = 0, end: int | None = None, folders: tuple[Box, ...] = ()) -> Iterator[Box]:
    """Every box, folders before what is in them."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size = int.from_bytes(data[start : start + 4], "big")
        if not 8 <= size <= end - start:
            return
        box = Box(bytes(data[start + 4 : start + 8]), start, start + size, folders)
        yield box
        if box.kind in FOLDERS:
            yield from boxes(data, start + 8, box.end, (*folders, box))
        start = box.end


def find(data: bytes, kind: bytes) -> Box:
    """The first of that kind."""
    return next(box for box in boxes(data) if box.kind == kind)


def replaced(data: bytes, box: Box, new: bytes) -> bytes:
    """With `new` in place of a box, and the sizes of its folders set right.

    Offsets into the media data stay as they are: they hold where the box lies behind it.
    """
    out = bytearray(data[: box.start] + new + data[box.end :])
    for folder in box.folders:
        struct.pack_into(">I", out, folder.start, folder.end - folder.start + len(new) - (box.end - box.start))
    return bytes(out)


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body
