"""Check before decoding that a video file exists, and read from its container how many bytes it should have.

Decoders read a truncated file up to the cut, some of them silently. Many containers declare their size in bytes, which
reveals the cut. Some writers declare too much, so the size alone proves nothing: `Packets.incomplete` looks for frames
that are really missing. Data after the declared end, such as a tag, are ignored.
"""

import stat
from pathlib import Path
from typing import BinaryIO

from specvlm.errors import MissingVideo, UserError

# Types of the top-level boxes that an MP4 or MOV file consists of.
BOXES = frozenset(
    b"ftyp styp moov moof mdat mfra free skip wide pnot uuid meta meco udta sidx ssix pdin emsg prft imda".split()
)


def check_file(path: Path) -> None:
    """Check that a file can be read.

    Raises:
        MissingVideo: There is no such file.
        UserError: It is a folder, pipe, socket or device, is empty, has an invalid name, or cannot be opened.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            path.open("rb").close()
    except FileNotFoundError:
        hint = " (addresses are not fetched: download it first)" if "://" in str(path) or ":/" in str(path) else ""
        raise MissingVideo(f"no such file: {path}{hint}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"cannot read {str(path)!r}: it has a null character in its name") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would block its reader, a device may never end
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise UserError(f"{path} is {what}, not a video file")
    if found.st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")


def truncated(path: Path, declared: int, size: int) -> UserError:
    """Return the error for a file that has `size` bytes but declares `declared` bytes."""
    return UserError(f"{path} is truncated: it declares {declared:,} bytes and has {size:,}; fetch or write it again")


def declared_size(path: Path) -> int:
    """Return the size in bytes that an MP4/MOV, AVI or Matroska/WebM file declares.

    Returns 0 for other formats, and for AVI and Matroska files that declare none.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in BOXES:
            return _mp4_size(file, path.stat().st_size)
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        # A huge length means that the writer did not know it. 7, not 8, since the last byte may be padding.
        return 0 if length >= 2**31 - 1 else 7 + length
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_size(head)
    return 0


def _mp4_size(file: BinaryIO, size: int) -> int:
    """Return where the last top-level box ends, by following the (size, type) of each box (ISO/IEC 14496-12, 4.2).

    A box of unknown type that would run past the end of the file is taken for other data appended to the file.
    """
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # the size is in the next eight bytes
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: the box ends with the file; 1 to 7: not a box
            return size
        if place + length > size and head[4:8] not in BOXES:
            return size
        place += length
    return place


def _matroska_size(head: bytes) -> int:
    """Return where the segment after the EBML header ends; 0 if that is not declared (RFC 8794, section 4)."""
    length, used = _vint(head[4:])
    segment = 4 + used + length
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    length, used = _vint(head[segment + 4 :])
    unknown = length == (1 << 7 * used) - 1  # all ones: a live recording
    return 0 if unknown or not used else segment + 4 + used + length


def _vint(data: bytes) -> tuple[int, int]:
    """Read a variable-size integer of EBML. Returns it and its number of bytes (0 if there is none)."""
    used = 9 - data[0].bit_length() if data and data[0] else 0
    value = int.from_bytes(data[:used], "big")
    return value & ((1 << 7 * used) - 1), used
