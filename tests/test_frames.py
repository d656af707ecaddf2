"""Folders of pictures: each is shown upright and in 8 bits, as transformers loads it, or refused in one line."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from specvlm.errors import UserError
from specvlm.video.frames import read_frames, read_picture

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def picture(mode: str) -> Image.Image:
    """Make 24 rows of 40 pixels; modes with transparency have some."""
    if mode == "P":
        image = Image.fromarray(NOISE).quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    if mode == "RGBA":
        return Image.fromarray(np.dstack([NOISE, NOISE[..., 0]]), "RGBA")
    return Image.fromarray(NOISE).convert(mode)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_orientation_says(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the top left quarter is white
    turned = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)}
    turned |= {6: np.rot90, 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"1.{suffix}"
    Image.fromarray(np.ascontiguousarray(turned.get(orientation, np.asarray)(upright))).save(path, exif=exif)
    assert torch.equal(read_picture(path) > 127, torch.from_numpy(upright > 127).permute(2, 0, 1))


MODES = [("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
MODES += [("jpg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")]


@pytest.mark.parametrize(("suffix", "mode"), MODES, ids=str)
def test_every_kind_of_pixel_is_what_transformers_makes_of_it(tmp_path, suffix, mode, recwarn):
    path = tmp_path / f"1.{suffix}"
    picture(mode).save(path)
    found = read_picture(path).permute(1, 2, 0).numpy()
    assert not recwarn.list, "nothing is said of transparency that is dropped"
    assert np.array_equal(found, np.asarray(load_image(str(path))))


def test_16_bit_grey_keeps_its_upper_eight_bits(tmp_path):
    path = tmp_path / "1.png"
    Image.fromarray(RAMP).save(path)
    found = read_picture(path)
    assert torch.equal(found, torch.from_numpy((RAMP >> 8).astype(np.uint8)).expand(3, -1, -1))
    assert found.float().mean() == 127.5


def png_16(samples: np.ndarray) -> bytes:
    """Encode a PNG of 16 bits per sample: (H, W, 2) grey with alpha, (H, W, 3) colour, (H, W, 4) colour with alpha."""
    height, width, count = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_16_bit_grey_is_as_bright_as_16_bit_colour(tmp_path, count):
    (tmp_path / "1.png").write_bytes(png_16(np.dstack([RAMP] * count)))
    assert torch.equal(read_picture(tmp_path / "1.png")[0], torch.from_numpy((RAMP >> 8).astype(np.uint8)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_an_animation_is_its_first_picture(tmp_path, kind):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))
    first.save(tmp_path / "1.png", kind, save_all=True, append_images=[second], lossless=True)
    assert read_picture(tmp_path / "1.png")[:, 0, 0].tolist() == [255, 0, 0]


def claims(side: int) -> bytes:
    """Make a PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


BAD = {
    "bomb": claims(60_000),
    "large": claims(10_000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    "text": b"no picture",
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*BAD, "cut", "pipe", "folder"])
def test_what_is_no_picture_ends_with_one_line(tmp_path, kind, recwarn):
    path = tmp_path / "1.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        Image.fromarray(NOISE).save(path)
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_bytes(BAD[kind])
    said = {"bomb": "more than", "large": "10000x10000, more than", "pipe": "is not a file", "folder": "is not a file"}
    with pytest.raises(UserError, match=said.get(kind, "is damaged or not a picture")) as caught:
        read_frames(tmp_path, 1.0)
    assert "\n" not in str(caught.value) and not recwarn.list


def test_names_with_digits_of_other_scripts_are_sorted(tmp_path):
    for name in ("\N{SUPERSCRIPT TWO}.png", "2.png", "10.png", "a\N{CIRCLED DIGIT ONE}.png"):
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(Path(tmp_path, name))
    assert len(read_frames(tmp_path, 1.0).frames) == 4


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_gives_no_times_is_refused(tmp_path, fps):
    with pytest.raises(UserError, match="expected frames per second above 0"):
        read_frames(tmp_path, fps)
