"""What is done to a clip after it was encoded: cut, turned, joined, patched, mixed with other streams.

Each edit takes the file that was encoded and the path of the file to write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from videos.boxes import box, find, replaced
from videos.cells import CONTAINERS, Cell
from videos.ffmpeg import ffmpeg

Edit = Callable[[Path, Path], object]

_RED = ("-f", "lavfi", "-i", "color=red:s=64x64:r=10:d=5")
_BIG_RED = ("-f", "lavfi", "-i", "color=red:s=128x128:r=10:d=5")
_SOUND = ("-f", "lavfi", "-i", "sine=d=5")
_SECOND = 10240  # of the track's clock of the clips at 10 frames a second in MP4; the film's counts milliseconds


def copied(before: str = "", after: str = "") -> Edit:
    """Copied by ffmpeg, without encoding, with options for the input and the output."""
    return lambda base, out: ffmpeg(*before.split(), "-i", base, "-map", "0", "-c", "copy", *after.split(), *_muxer(out), out)


def patched(change: Callable[[bytes], bytes]) -> Edit:
    return lambda base, out: out.write_bytes(change(base.read_bytes()))


def piped(base: Path, out: Path) -> None:
    """Written to where ffmpeg cannot go back: sizes and indexes of the header stay unknown."""
    kind = {".mkv": "matroska", ".wmv": "asf"}.get(base.suffix, base.suffix[1:])
    out.write_bytes(ffmpeg("-i", base, "-c", "copy", *_muxer(out), "-f", kind, "-").stdout)


def joined(base: Path, out: Path) -> None:
    """Twice the same, one behind the other."""
    parts = out.with_suffix(".txt")
    parts.write_text(f"file '{base.resolve()}'\n" * 2)
    ffmpeg("-f", "concat", "-safe", "0", "-i", parts, "-c", "copy", out)


def jump(base: Path, out: Path) -> None:
    """Two parts of a broadcast whose clock jumps back, then on."""
    ffmpeg("-i", base, "-c", "copy", "-output_ts_offset", "1000", out)
    out.write_bytes(out.read_bytes() + base.read_bytes())


def resized(base: Path, out: Path) -> None:
    """The picture grows midway: parameter sets in the stream, as in a broadcast."""
    other, parts = out.with_name(f"other-{out.name}"), out.with_suffix(".txt")
    ffmpeg("-i", base, "-vf", "scale=192:128", "-c:v", "libx264", "-g", "10", "-bf", "3", other)
    parts.write_text(f"file '{base.resolve()}'\nfile '{other.resolve()}'\n")
    ffmpeg("-f", "concat", "-safe", "0", "-i", parts, "-c", "copy", out)


def mixed(*others: str, order: str, words: str = "") -> Edit:
    """With streams of other inputs beside the clip's, which is input 0."""
    maps = [word for stream in order.split() for word in ("-map", stream)]
    return lambda base, out: ffmpeg("-i", base, *others, *maps, "-c", "copy", *words.split(), out)


def cover(base: Path, out: Path) -> None:
    picture = out.with_suffix(".png")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=600x600", "-frames:v", "1", picture)
    if out.suffix == ".mkv":
        ffmpeg("-i", base, "-c", "copy", "-attach", picture, "-metadata:s:t", "mimetype=image/png", out)
    else:
        ffmpeg("-i", base, "-i", picture, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:1", "attached_pic", out)


def subtitled(base: Path, out: Path) -> None:
    text = out.with_suffix(".srt")
    text.write_text("1\n00:00:00,000 --> 00:00:04,000\nA line\n")
    ffmpeg("-i", text, "-i", base, "-map", "0", "-map", "1", "-c:v", "copy", "-c:s", "mov_text", out)


def audio_cut(base: Path, out: Path) -> None:
    """Cut where the sound can be and the picture cannot, as phones and editors do."""
    both = out.with_name(f"both-{out.name}")
    mixed(*_SOUND, order="1:a 0:v", words="-c:a aac")(base, both)
    ffmpeg("-ss", "2.35", "-i", both, "-map", "0", "-c", "copy", out)


def edit_list(*entries: tuple[int, int, int]) -> Edit:
    """Entries (ms that are shown, place in the track's clock or -1 for a delay, rate)."""
    body = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiI", ms, at, rate << 16) for ms, at, rate in entries)
    return patched(lambda data: replaced(data, find(data, b"elst"), box(b"elst", body)))


def matrix(a: float, b: float, c: float, d: float) -> Edit:
    """The display matrix of the track header, with a shift of 7 and 5 pixels."""
    numbers = struct.pack(">9i", *(round(value * 65536) for value in (a, b, 0, c, d, 0, 7, 5)), 1 << 30)

    def change(data: bytes) -> bytes:
        at = find(data, b"tkhd").start + 48
        return data[:at] + numbers + data[at + len(numbers) :]

    return patched(change)


def long_size(data: bytes) -> bytes:
    """The media data with a size of 64 bits, in the room of the empty box before it."""
    media = find(data, b"mdat")
    assert data[media.start - 8 : media.start] == b"\0\0\0\x08free"
    size = struct.pack(">I4sQ", 1, b"mdat", media.end - media.start + 8)
    return data[: media.start - 8] + size + data[media.start + 8 :]


def padded_mdat(data: bytes) -> bytes:
    """Media data that say they are longer than the file, all samples in place, as recorders reserve room."""
    front = _moov_first(data)
    media = find(front, b"mdat")
    return front[: media.start] + struct.pack(">I", media.end - media.start + 5000) + front[media.start + 4 :]


def endless_mdat(data: bytes) -> bytes:
    """Media data of size 0: up to the end of the file."""
    front = _moov_first(data)
    media = find(front, b"mdat")
    return front[: media.start] + bytes(4) + front[media.start + 4 :]


def _moov_first(data: bytes) -> bytes:
    movie, media = find(data, b"moov"), find(data, b"mdat")
    size, chunks = movie.end - movie.start, find(data, b"stco")
    out = bytearray(data)
    for at in range(chunks.start + 16, chunks.end, 4):
        struct.pack_into(">I", out, at, int.from_bytes(out[at : at + 4], "big") + size)
    return bytes(out[: media.start] + out[movie.start : movie.end] + out[media.start : media.end])


def headless(data: bytes) -> bytes:
    """Without its first two fifths: it starts within a group of pictures, and within a packet."""
    return data[len(data) * 2 // 5 :]


def lost_packets(data: bytes) -> bytes:
    """A broadcast with a gap: 3 of its packets of 188 bytes are lost, a third into it."""
    at = len(data) // 188 // 3 * 188
    return data[:at] + data[at + 3 * 188 :]


def _turned(words: str) -> Edit:
    return lambda base, out: ffmpeg(*words.split(), "-i", base, "-c", "copy", out)


def _turns() -> Iterator[tuple[str, Edit]]:
    for turn in (0, 45, 90, 180, 270):
        for flip in ("", "hflip", "vflip"):
            name = "_".join(filter(None, (f"turn{turn}" if turn else "", flip)))
            yield name, _turned(f"-display_rotation {turn} " + (f"-display_{flip}" if flip else ""))


def _muxer(out: Path) -> list[str]:
    return CONTAINERS[out.name.split("-")[0]][1].split()


EDITS: dict[str, Edit] = {
    "cut": copied("-ss 2"),
    "cut_between": copied("-ss 2.35"),
    "tail": copied("-ss 1.2", "-t 2.05"),
    "copied_middle": copied("", "-ss 2.35 -copyinkf"),  # from any packet on, the picture it refers to or not
    "late": copied("", "-output_ts_offset 10"),
    "negative": copied("", "-output_ts_offset -1 -avoid_negative_ts disabled"),
    "wrapped": copied("", "-output_ts_offset 95441.5 -muxdelay 0"),  # the clock of 33 bits starts anew within the clip
    "holes": copied("", "-bsf:v noise=amount=0:drop='gt(n\\,2)*not(mod(n\\,7))'"),  # packets never recorded
    "piped": piped,
    "joined": joined,
    "joined_bytes": patched(lambda data: data * 2),
    "jump": jump,
    "resized": resized,
    "tagged": patched(lambda data: data + b"TAGsome title".ljust(128, b"\0")),
    "zeros": patched(lambda data: data + bytes(5000)),
    "truncated": patched(lambda data: data[: len(data) * 9 // 10]),
    "headless": patched(headless),
    "lost_packets": patched(lost_packets),
    "long_size": patched(long_size),
    "padded_mdat": patched(padded_mdat),
    "endless_mdat": patched(endless_mdat),
    "edit_start": edit_list((4000, _SECOND, 1)),
    "edit_between": edit_list((3650, _SECOND + 350 * _SECOND // 1000, 1)),
    "edit_end": edit_list((3000, 0, 1)),
    "edit_twice": edit_list((2000, _SECOND, 1), (2000, _SECOND, 1)),
    "edit_skip": edit_list((1000, 0, 1), (2000, 3 * _SECOND, 1)),
    "edit_delay": edit_list((700, -1, 1), (4000, _SECOND, 1)),
    "edit_still": edit_list((1000, _SECOND, 0), (2000, _SECOND, 1)),
    "decoy": mixed(*_RED, order="1:v 0:v", words="-c:v:0 libx264 -disposition:v:0 0 -disposition:v:1 default"),
    "decoy_last": mixed(*_RED, order="0:v 1:v", words="-c:v:1 libx264 -disposition:v:1 default -disposition:v:0 0"),
    "decoy_bigger": mixed(*_BIG_RED, order="1:v 0:v", words="-c:v:0 libx264 -disposition:v:0 0 -disposition:v:1 default"),
    "decoy_both": mixed(*_RED, order="1:v 0:v", words="-c:v:0 libx264 -disposition:v:0 default -disposition:v:1 default"),
    "cover": cover,
    "audio": mixed(*_SOUND, order="1:a 0:v"),
    "audio_cut": audio_cut,
    "subtitles": subtitled,
    "sei_turn90": copied("", "-bsf:v h264_metadata=display_orientation=insert:rotate=90"),
    "sei_hflip": copied("", "-bsf:v h264_metadata=display_orientation=insert:flip=horizontal"),
    "sei_turn90_vflip": copied("", "-bsf:v h264_metadata=display_orientation=insert:rotate=90:flip=vertical"),
    "matrix_scaled": matrix(0, 2, -0.5, 0),  # a quarter turn, stretched
    "matrix_shifted": matrix(-1, 0, 0, 1),
    "matrix_empty": matrix(0, 0, 0, 0),
    "matrix_slanted": matrix(1, 0.5, 0, 1),
    **dict(_turns()),
}


class Maker:
    """Makes cells' files in a folder, each encoding once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, cell: Cell) -> Path:
        path = self._folder / cell.name
        if path.exists():
            return path
        if cell.edit == "whole":
            ffmpeg(*cell.words(), path)
        else:
            EDITS[cell.edit](self(cell.whole), path)
        return path
