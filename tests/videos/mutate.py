"""Damage a video file as only an attacker or a bad disc does: in the fields that a reader believes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from videos.boxes import boxes, replaced

# What marks a field's place, the byte order, and where behind the mark its numbers of 32 bits are.
_FIELDS: tuple[tuple[bytes, str, tuple[int, ...]], ...] = (
    (b"stts", ">", (4, 8, 12)),  # MP4: how many entries; frames and duration of the first
    (b"ctts", ">", (4, 8, 12)),
    (b"stsc", ">", (4, 8, 12, 16)),  # chunks: first, frames in each, description
    (b"stsz", ">", (4, 8, 12)),  # size of all, how many, size of the first
    (b"stco", ">", (4, 8)),
    (b"stss", ">", (4, 8)),
    (b"elst", ">", (4, 8, 12, 16)),
    (b"mvhd", ">", (12, 16)),  # clock and duration
    (b"mdhd", ">", (12, 16)),
    (b"tkhd", ">", (20, 40, 44, 52, 56, 76, 80)),  # duration, display matrix, width, height
    (b"avc1", ">", (24,)),  # width and height, 16 bits each
    (b"avcC", ">", (0, 4)),
    (b"stsd", ">", (4, 8)),
    (b"trun", ">", (4, 8, 12)),
    (b"tfhd", ">", (4, 8)),
    (b"trex", ">", (8, 12, 16)),
    (b"mdat", ">", (-8,)),
    (b"moov", ">", (-8,)),
    (b"RIFF", "<", (0,)),
    (b"avih", "<", (4, 16, 20, 36, 40)),  # AVI: µs a frame, flags, frames, width, height
    (b"strh", "<", (24, 28, 32, 36, 48)),  # scale, rate, start, length, size of a sample
    (b"strf", "<", (4, 8, 12, 16)),
    (b"idx1", "<", (0, 8, 12, 16)),
    (b"movi", "<", (-8, 4)),
    (b"\x2a\xd7\xb1", ">", (0, 1)),  # Matroska: nanoseconds of a tick
    (b"\x23\xe3\x83", ">", (0, 1)),  # duration of a frame
    (b"\x44\x89", ">", (0, 1)),  # duration
    (b"\x1f\x43\xb6\x75", ">", (0, 4)),  # size of a cluster
    (b"\x16\x54\xae\x6b", ">", (0, 4)),  # size of the tracks
    (b"\xb0\x81", ">", (-1, 0)),  # width
    (b"GIF89a", "<", (0,)),  # width and height, 16 bits each
    (b"FLV\x01", ">", (1, 9)),
    (b"OggS", "<", (2, 6, 14, 22)),
)
_ABSURD = (0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

Mutation = Callable[[Random, bytes], bytes]


def mutate(rng: Random, data: bytes) -> bytes:
    """Change a file in one to three ways, most of them in what it says of itself."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choices(_MUTATIONS, _WEIGHTS)[0](rng, data)
    return data


def _absurd_field(rng: Random, data: bytes) -> bytes:
    marks = [(at, order, offsets) for mark, order, offsets in _FIELDS for at in _ends(data, mark)]
    if not marks:
        return _flipped_header(rng, data)
    at, order, offsets = rng.choice(marks)
    place = at + rng.choice(offsets)
    value = struct.pack(f"{order}I", rng.choice(_ABSURD) if rng.random() < 0.9 else rng.getrandbits(32))
    return data[:place] + value + data[place + 4 :] if 0 <= place <= len(data) - 4 else data


def _ends(data: bytes, mark: bytes) -> list[int]:
    """The places behind a mark, where it comes at most 8 times."""
    found = data.find(mark)
    places: list[int] = []
    while found >= 0 and len(places) < 8:
        places.append(found + len(mark))
        found = data.find(mark, found + 1)
    return places


def _flipped_header(rng: Random, data: bytes) -> bytes:
    """Bits of the first 200 bytes or the last 1,000, where headers and indexes are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(min(200, len(out))) if rng.random() < 0.5 else len(out) - 1 - rng.randrange(min(1000, len(out)))
        out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _flipped(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 40)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncated(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _overwritten(rng: Random, data: bytes) -> bytes:
    """A stretch of zeros, ones or noise."""
    first, last = _stretch(rng, data)
    filling = rng.choice((bytes(last - first), b"\xff" * (last - first), rng.randbytes(last - first)))
    return data[:first] + filling + data[last:]


def _swapped(rng: Random, data: bytes) -> bytes:
    first, middle, last = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[middle:last] + data[first:middle] + data[last:]


def _repeated(rng: Random, data: bytes) -> bytes:
    first, last = _stretch(rng, data)
    return data[:last] + data[first:last] * rng.choice((1, 2, 200)) + data[last:]


def _removed(rng: Random, data: bytes) -> bytes:
    first, last = _stretch(rng, data)
    return data[:first] + data[last:] or data


def _box(rng: Random, data: bytes) -> bytes:
    """An MP4 box twice, gone, emptied, or with another's content; another kind of file is overwritten in a stretch."""
    found = list(boxes(data))
    if len(found) < 4:
        return _overwritten(rng, data)
    box, other = rng.choice(found), rng.choice(found)
    whole = data[box.start : box.end]
    new = rng.choice((whole * 2, whole * 50, b"", whole[:8] + bytes(len(whole) - 8), data[other.start : other.end]))
    return replaced(data, box, new) or data


def _stretch(rng: Random, data: bytes) -> tuple[int, int]:
    first = rng.randrange(len(data))
    return first, min(len(data), first + rng.choice((1, 4, 16, 188, 1000)))


_MUTATIONS: tuple[Mutation, ...] = (
    *(_absurd_field, _box, _flipped_header, _flipped, _truncated),
    *(_overwritten, _swapped, _repeated, _removed),
)
_WEIGHTS = (8, 3, 2, 1, 1, 2, 1, 1, 1)
