"""Readers and sampling: the frame asked for is the frame given, and bad input ends with one clear line."""

import math
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from specvlm.data.readers import READERS, PyavReader
from specvlm.data.video import SAMPLINGS, probe, read_video
from specvlm.errors import UserError

av = pytest.importorskip("av", reason="PyAV makes the test clips")
pytest.importorskip("decord", reason="decord has no wheel for this machine")

BITS, SIDE, GOP = 8, 16, 20
BBB = Path(__file__).parents[1] / "specvlm" / "assets" / "clips" / "bbb_apple.mp4"
OPEN_X264 = {"x264-params": "open-gop=1:scenecut=0", "bf": "3"}


def draw(path: Path, frames: int = 90, encoder: str = "libx264", options=None, stamps=None, fast=True) -> Path:
    """Write a clip whose frames carry their number: bit b lights column b of the lower half. ``stamps``: ms of each."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if fast and path.suffix == ".mp4" else {}) as out:
        stream = out.add_stream(encoder, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = BITS * SIDE, 64, "yuv420p", GOP
        stream.options = {"preset": "ultrafast", "bf": "2"} | (options or {}) if encoder != "mpeg4" else {}
        if stamps:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            picture = np.full((64, BITS * SIDE, 3), number * 2 % 256, np.uint8)
            picture[32:] = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], SIDE)[:, None]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    lit = frames[:, 0, 48, SIDE // 2 :: SIDE] > 127
    return (lit.long() * 2 ** torch.arange(BITS)).sum(1).tolist()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    stamps = np.cumsum([0, *(20 + 37 * k % 90 for k in range(89))]).tolist()
    return {
        "h264": draw(folder / "h264.mp4"),
        "mkv": draw(folder / "h264.mkv"),
        "avi": draw(folder / "mpeg4.avi", encoder="mpeg4"),
        "varying": draw(folder / "varying.mp4", stamps=stamps),
        "late": draw(folder / "late.mp4", stamps=[1000 + 40 * k for k in range(90)]),
        "open_mp4": draw(folder / "open.mp4", options=OPEN_X264),
        "open_mkv": draw(folder / "open.mkv", options=OPEN_X264),
        "one": draw(folder / "one.mp4", frames=1),
        "ts": draw(folder / "stream.ts"),
        "moov_last": draw(folder / "last.mp4", fast=False),
    }


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["h264", "mkv", "avi", "varying", "late", "open_mp4", "open_mkv"])
@pytest.mark.parametrize("count", [2, 7, 31, 90])
def test_readers_give_the_frames_asked_for(clips, kind, reader, count):
    clip = read_video(clips[kind], frames=count, reader=reader)
    assert numbers(clip.frames) == [k * 90 // count for k in range(count)]
    assert (clip.total_frames, clip.frames.dtype, clip.frames.is_contiguous()) == (90, torch.uint8, True)


@pytest.mark.parametrize("kind", ["h264", "varying", "open_mkv"])
def test_decord_and_pyav_agree_bit_for_bit_and_on_times(clips, kind):
    one, other = (read_video(clips[kind], frames=13, reader=reader) for reader in READERS)
    assert torch.equal(one.frames, other.frames)
    assert one.times == pytest.approx(other.times, abs=1e-4)
    assert (one.fps, one.source_fps) == pytest.approx((other.fps, other.source_fps))


def test_transport_streams_are_exact_with_pyav_and_refused_by_decord(clips):
    assert numbers(read_video(clips["ts"], frames=9, reader="pyav").frames) == [k * 10 for k in range(9)]
    with pytest.raises(UserError, match="reader=pyav"):
        read_video(clips["ts"], frames=9)


def test_pyav_decodes_no_group_of_pictures_without_a_wanted_frame(clips, monkeypatch):
    decoded, original = [], PyavReader._from

    def counted(self, key):
        for item in original(self, key):
            decoded.append(item)
            yield item

    monkeypatch.setattr(PyavReader, "_from", counted)
    read_video(clips["h264"], frames=2, reader="pyav")  # frames 0 and 45: the key frame before is 40
    assert len(decoded) <= 1 + 6


@pytest.mark.parametrize(("turn", "matrix"), [(-1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (1, (0, -1, 1, 0))])
def test_rotated_videos_are_turned_upright_by_both_readers(clips, tmp_path, turn, matrix):
    data = bytearray(clips["h264"].read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # the display matrix of a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    plain = read_video(clips["h264"], frames=5, reader="pyav").frames
    for reader in READERS:
        assert torch.equal(read_video(path, frames=5, reader=reader).frames, plain.rot90(turn, (2, 3)))
        info = probe(path, reader)
        assert (info.height, info.width) == tuple(plain.rot90(turn, (2, 3)).shape[2:])


def test_sampling_rules_are_the_documented_ones():
    assert SAMPLINGS["uniform"](100, 8) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert SAMPLINGS["qwen"](100, 8) == torch.arange(0, 100, 100 / 8).int().tolist()
    assert SAMPLINGS["endpoints"](100, 4) == [0, 33, 66, 99]
    for total in range(1, 200):
        for count in range(1, total + 1):
            for name, rule in SAMPLINGS.items():
                index = rule(total, count)
                assert len(index) == count and index == sorted(set(index)) and index[-1] < total, (name, total, count)


@pytest.mark.parametrize("reader", READERS)
def test_fps_takes_that_many_frames_a_second_and_says_what_it_got(clips, reader):
    clip = read_video(clips["h264"], fps=5, reader=reader)  # 3.6 s of 25 fps
    assert numbers(clip.frames) == list(range(0, 90, 5))
    assert (clip.fps, clip.source_fps) == pytest.approx((5, 25))
    assert len(read_video(clips["h264"], fps=1000, reader=reader).frames) == 90
    assert len(read_video(clips["h264"], fps=0.01, reader=reader).frames) == 1
    assert len(read_video(clips["h264"], fps=25, max_frames=7, reader=reader).frames) == 7


def test_qwen_sampling_makes_counts_even_as_hugging_face_does(clips):
    assert len(read_video(clips["h264"], frames=7, sampling="qwen").frames) == 8
    assert len(read_video(clips["h264"], fps=0.1, sampling="qwen").frames) == 4
    assert len(read_video(clips["h264"], fps=25, max_frames=9, sampling="qwen").frames) == 8


@pytest.mark.parametrize("reader", READERS)
def test_a_window_starts_and_ends_at_the_seconds_given(clips, reader):
    clip = read_video(clips["late"], start=1.0, end=2.0, reader=reader)  # times count from the first frame
    assert numbers(clip.frames) == list(range(25, 50))
    assert clip.times[0] == pytest.approx(1.0, abs=1e-4)
    assert clip.fps == pytest.approx(25)
    part = probe(clips["late"], reader, start=1.0, end=2.0)
    assert (part.frames, part.duration, part.fps) == pytest.approx((25, 1.0, 25))
    with pytest.raises(UserError, match="end=1.0: wanted seconds after start=2.0"):
        probe(clips["late"], reader, start=2.0, end=1.0)


@pytest.mark.parametrize("reader", READERS)
def test_varying_frame_rates_keep_the_time_of_each_frame(clips, reader):
    clip = read_video(clips["varying"], reader=reader)
    steps = np.diff(clip.times) * 1000
    assert steps == pytest.approx([20 + 37 * k % 90 for k in range(89)], abs=0.1)
    assert clip.source_fps == pytest.approx(89 / clip.times[-1], rel=0.02)


@pytest.mark.parametrize("reader", READERS)
def test_a_video_of_one_frame_is_read(clips, reader):
    clip = read_video(clips["one"], frames=1, reader=reader)
    assert (numbers(clip.frames), clip.times, clip.total_frames, clip.fps) == ([0], (0.0,), 1, 25.0)
    with pytest.raises(UserError, match="has 1 frames, fewer than the 8 asked for"):
        read_video(clips["one"], frames=8, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_the_sample_of_real_footage_is_what_its_readme_says(reader):
    info = probe(BBB, reader)
    assert (info.frames, info.fps, info.width, info.height, info.duration) == (192, 24.0, 448, 252, 8.0)


def bad_files(folder: Path, clips: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Each bad input with what its message must say."""

    def write(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def half(kind: str) -> Path:
        data = clips[kind].read_bytes()
        return write(f"cut_{clips[kind].name}", data[: len(data) // 2])

    damaged = bytearray(clips["h264"].read_bytes())
    place = damaged.find(b"mdat") + 8
    damaged[place + 300 : -300] = bytes(len(damaged) - place - 600)
    sound = folder / "sound.mp4"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with av.open(str(folder / "none.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
    png = av.CodecContext.create("png", "w")
    png.width, png.height, png.pix_fmt, png.time_base = 16, 16, "rgb24", Fraction(1, 25)
    noise = np.random.default_rng(0)
    return {
        "missing": (folder / "missing.mp4", "no such file"),
        "address": (Path("https://example.org/a.mp4"), "not fetched"),
        "folder": (folder, "is a folder"),
        "empty": (write("empty.mp4", b""), "is empty"),
        "noise": (write("noise.mp4", noise.bytes(50_000)), "not a video"),
        "text": (write("text.mp4", b"hello world\n" * 500), "not a video"),
        "text_file": (write("text.txt", b"hello world\n" * 500), "not a video"),
        "image": (write("image.png", b"".join(map(bytes, [*png.encode(picture), *png.encode()]))), "is an image"),
        "cut_moov_first": (half("h264"), "is truncated"),
        "cut_moov_last": (half("moov_last"), "is truncated"),
        "cut_mkv": (half("mkv"), "is truncated"),
        "cut_avi": (half("avi"), "is truncated"),
        "damaged": (write("damaged.mp4", bytes(damaged)), "is damaged"),
        "sound": (sound, "has no video stream"),
        "no_frames": (folder / "none.mp4", "has no video stream|no frames"),
    }


@pytest.mark.parametrize("reader", READERS)
def test_bad_files_end_with_one_line_and_a_clean_terminal(clips, tmp_path, reader, capfd):
    cases = bad_files(tmp_path, clips)
    capfd.readouterr()
    for name, (path, message) in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            read_video(path, frames=8, reader=reader)
        assert "\n" not in str(caught.value), name
        if name != "damaged":  # its first frame is whole
            with pytest.raises(UserError, match=message):
                probe(path, reader)
    assert capfd.readouterr() == ("", "")


def test_av1_is_read_by_pyav_and_decord_says_so(tmp_path):
    try:
        path = draw(tmp_path / "av1.mp4", frames=5, encoder="libsvtav1", options={"preset": "12"})
    except av.FFmpegError:
        pytest.skip("this PyAV has no AV1 encoder")
    assert len(read_video(path, frames=5, reader="pyav").frames) == 5
    with pytest.raises(UserError, match="such as AV1.*reader=pyav"):
        read_video(path, frames=5)


@pytest.mark.parametrize(("reader", "module", "package"), [("decord", "decord", "decord"), ("pyav", "av", "av")])
def test_a_reader_that_is_not_installed_says_what_to_install(monkeypatch, reader, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        probe(BBB, reader)


def test_decord_reads_without_pyav(monkeypatch):
    expected = read_video(BBB, frames=5)
    monkeypatch.setitem(sys.modules, "av", None)
    assert torch.equal(read_video(BBB, frames=5).frames, expected.frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "pyaw"}, 'unknown reader "pyaw": one of decord, pyav. Did you mean "pyav"?'),
        ({"sampling": "unifrom"}, "unknown sampling.*uniform, qwen, endpoints"),
        ({"frames": 4, "fps": 1.0}, "exclude each other"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 2.5}, "frames=2.5"),
        ({"frames": 193}, "has 192 frames, fewer than the 193 asked for"),
        ({"frames": 100, "max_frames": 50}, "max_frames=50"),
        ({"max_frames": 50}, "192 frames are more than max_frames=50"),
        ({"fps": 0.0}, "fps=0"),
        ({"fps": math.nan}, "fps=nan"),
        ({"start": -1.0}, "start=-1"),
        ({"start": 2.0, "end": 2.0}, "end=2"),
        ({"start": 9.0}, "no frame from 9.0 s: its last one is at 7.96 s"),
        ({"frames": 50, "start": 7.0}, "24 frames from 7.0 s, fewer than the 50"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        read_video(BBB, **options)
