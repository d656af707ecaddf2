"""Readers and sampling: the requested frame is the one returned, and bad input ends with one clear line."""

import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from covering import sampled

from specvlm.errors import UserError
from specvlm.video import decord_process, pictures, readers
from specvlm.video.av_file import Orientation, opened
from specvlm.video.clips import find_clip
from specvlm.video.codec import read_stream
from specvlm.video.decord_process import DecordProcess
from specvlm.video.frame_index import Facts, index_of
from specvlm.video.packets import Packets
from specvlm.video.readers import NAMES, Group
from specvlm.video.video import SAMPLINGS, probe, read_video

av = pytest.importorskip("av", reason="PyAV makes the test clips")
pytest.importorskip("decord", reason="decord has no wheel for this machine")

BITS, SIDE, GOP = 8, 16, 20
BBB = Path(__file__).parents[1] / "specvlm" / "assets" / "clips" / "bbb_apple.mp4"
OPEN_X264 = {"x264-params": "open-gop=1:scenecut=0", "bf": "3"}


def draw(path: Path, frames: int = 90, encoder: str = "libx264", options=None, stamps=None, fast=True) -> Path:
    """Write a clip whose frames encode their number: bit b lights column b of the lower half. ``stamps``: in ms."""
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


@pytest.mark.parametrize(
    ("kind", "reader", "count"),
    sampled(["h264", "mkv", "avi", "varying", "late", "open_mp4", "open_mkv"], NAMES, [2, 7, 31, 90], pairs=True),
)
def test_readers_give_the_frames_asked_for(clips, kind, reader, count):
    clip = read_video(clips[kind], frames=count, reader=reader)
    assert numbers(clip.frames) == [k * 90 // count for k in range(count)]
    assert (clip.total_frames, clip.frames.dtype, clip.frames.is_contiguous()) == (90, torch.uint8, True)


@pytest.mark.parametrize("kind", ["h264", "varying", "mkv"])
def test_decord_and_pyav_agree_bit_for_bit_and_on_times(clips, kind):
    one, other = (read_video(clips[kind], frames=13, reader=reader) for reader in ("decord", "pyav"))
    assert (one.reader, other.reader) == ("decord: as asked", "pyav: as asked")
    assert torch.equal(one.frames, other.frames)
    assert one.times == pytest.approx(other.times, abs=1e-4)
    assert (one.fps, one.source_fps) == pytest.approx((other.fps, other.source_fps))


@pytest.mark.parametrize("reader", NAMES)
def test_transport_streams_are_read_by_pyav_whatever_was_asked_and_the_clip_says_why(clips, reader):
    clip = read_video(clips["ts"], frames=9, reader=reader)
    assert numbers(clip.frames) == [k * 10 for k in range(9)]
    why = {"auto": "faster than decord", "pyav": "as asked", "decord": "must be counted"}[reader]
    assert clip.reader.startswith("pyav: ") and why in clip.reader


def test_pyav_decodes_no_group_of_pictures_without_a_wanted_frame(clips, monkeypatch):
    decoded, original = [], Group._frames

    def counted(self, key, wanted):
        for frame in original(self, key, wanted):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(Group, "_frames", counted)
    read_video(clips["h264"], frames=2, reader="pyav")  # frames 0 and 45: the key frame before is 40
    assert len(decoded) <= 1 + 6


@pytest.mark.parametrize(("kind", "cores"), sampled(["h264", "mkv", "varying", "open_mp4", "open_mkv"], [1, 2, 7]))
def test_frames_are_those_of_sequential_decoding_on_any_number_of_cores(clips, kind, cores, monkeypatch):
    with av.open(str(clips[kind])) as container:
        sequential = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    monkeypatch.setattr(readers, "_cores", lambda: cores)
    for count in (3, 20, 90):
        clip = read_video(clips[kind], frames=count)
        assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), np.stack([sequential[place] for place in clip.index]))


def test_a_file_that_changes_is_indexed_again(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clips["h264"].read_bytes())
    assert probe(path).frames == 90 and index_of(path) is index_of(path)
    path.write_bytes(clips["one"].read_bytes())
    assert probe(path).frames == 1


def test_frames_that_no_seek_reaches_are_looked_for_from_the_start(clips, monkeypatch):
    monkeypatch.setattr(Group, "decode", lambda self, key, wanted, put: list(wanted))
    assert numbers(read_video(clips["h264"], frames=9).frames) == [k * 10 for k in range(9)]


def test_a_packet_that_shows_nothing_is_noticed_and_the_frames_are_counted(tmp_path):
    plain = draw(tmp_path / "plain.mp4", 60, "libx265", {"x265-params": "log-level=none", "preset": "ultrafast"})
    with av.open(str(plain)) as source, av.open(str(tmp_path / "more.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            if packet.pts == 30 * 512:  # a unit that only says that a picture follows
                empty = av.Packet(bytes((0, 0, 0, 3, 70, 1, 80)) * 8)
                empty.stream, empty.pts, empty.dts, empty.time_base = stream, 30 * 512 - 250, packet.dts - 250, packet.time_base
                out.mux(empty)
            packet.stream = stream
            out.mux(packet)
    clip = read_video(tmp_path / "more.mkv", frames=60)
    assert numbers(clip.frames) == list(range(60)) and clip.total_frames == 60


def turned(path: Path, folder: Path, matrix: tuple[int, ...]) -> Path:
    """Copy an MP4 file, with the display matrix [a b c d] in whole numbers."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # the display matrix of a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    out = folder / f"turned{matrix}.mp4"
    out.write_bytes(data)
    return out


# What each display matrix does to a picture (H, W): quarter turns to the left, after a reflection of the columns.
MATRICES = {
    (1, 0, 0, 1): (0, False),
    (0, -1, 1, 0): (1, False),
    (-1, 0, 0, -1): (2, False),
    (0, 1, -1, 0): (3, False),
    (-1, 0, 0, 1): (0, True),
    (0, 1, 1, 0): (1, True),
    (1, 0, 0, -1): (2, True),
    (0, -1, -1, 0): (3, True),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_mirrored_videos_are_shown_upright_by_all_readers_and_so_is_their_motion(clips, tmp_path, matrix):
    path, (turns, mirrored) = turned(clips["h264"], tmp_path, matrix), MATRICES[matrix]

    def upright(pictures: torch.Tensor) -> torch.Tensor:
        return (pictures.flip(-1) if mirrored else pictures).rot90(turns, (-2, -1))

    plain = read_video(clips["h264"], frames=5, reader="pyav")
    for reader in NAMES:
        clip = read_video(path, frames=5, reader=reader)
        assert torch.equal(clip.frames, upright(plain.frames))
        assert clip.reader.startswith("decord") == (reader == "decord" and matrix == (1, 0, 0, 1))
        info = probe(path, reader)
        assert (info.height, info.width) == tuple(clip.frames.shape[2:])
    assert torch.equal(read_stream(clip.origin).motion, upright(read_stream(plain.origin).motion))


def test_a_video_to_be_shown_at_an_angle_is_refused(clips, tmp_path):
    with pytest.raises(UserError, match="rotated by 45 degrees; only multiples of 90"):
        read_video(turned(clips["h264"], tmp_path, (1, 1, -1, 1)), frames=5)


@pytest.mark.slow
def test_sampling_rules_are_the_documented_ones():
    assert SAMPLINGS["uniform"](100, 8) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert SAMPLINGS["qwen"](100, 8) == torch.arange(0, 100, 100 / 8).int().tolist()
    assert SAMPLINGS["endpoints"](100, 4) == [0, 33, 66, 99]
    for total in range(1, 200):
        for count in range(1, total + 1):
            for name, rule in SAMPLINGS.items():
                index = rule(total, count)
                assert len(index) == count and index == sorted(set(index)) and index[-1] < total, (name, total, count)


@pytest.mark.parametrize("reader", NAMES)
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


@pytest.mark.parametrize("reader", NAMES)
def test_a_window_starts_and_ends_at_the_seconds_given(clips, reader):
    clip = read_video(clips["late"], start=1.0, end=2.0, reader=reader)  # times count from the first frame
    assert numbers(clip.frames) == list(range(25, 50))
    assert clip.times[0] == pytest.approx(1.0, abs=1e-4)
    assert clip.fps == pytest.approx(25)
    part = probe(clips["late"], reader, start=1.0, end=2.0)
    assert (part.frames, part.duration, part.fps) == pytest.approx((25, 1.0, 25))
    with pytest.raises(UserError, match="end=1.0: expected seconds after start=2.0"):
        probe(clips["late"], reader, start=2.0, end=1.0)


@pytest.mark.parametrize("reader", NAMES)
def test_varying_frame_rates_keep_the_time_of_each_frame(clips, reader):
    clip = read_video(clips["varying"], reader=reader)
    steps = np.diff(clip.times) * 1000
    assert steps == pytest.approx([20 + 37 * k % 90 for k in range(89)], abs=0.1)
    assert clip.source_fps == pytest.approx(89 / clip.times[-1], rel=0.02)


@pytest.mark.parametrize("reader", NAMES)
def test_a_video_of_one_frame_is_read(clips, reader):
    clip = read_video(clips["one"], frames=1, reader=reader)
    assert (numbers(clip.frames), clip.times, clip.total_frames, clip.fps) == ([0], (0.0,), 1, 25.0)
    with pytest.raises(UserError, match="has 1 frames, fewer than the 8 asked for"):
        read_video(clips["one"], frames=8, reader=reader)


@pytest.mark.parametrize("reader", NAMES)
def test_the_sample_of_real_footage_is_what_its_readme_says(reader):
    info = probe(BBB, reader)
    assert (info.frames, info.fps, info.width, info.height, info.duration) == (192, 24.0, 448, 252, 8.0)


def bad_files(folder: Path, clips: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Return each bad input with what its message must say."""

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
        "sound": (sound, "has only sound"),
        "no_frames": (folder / "none.mp4", "has no video stream|no frames"),
    }


@pytest.mark.parametrize("reader", NAMES)
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


@pytest.mark.parametrize("reader", NAMES)
def test_av1_is_read_whatever_reader_was_asked_for(tmp_path, reader):
    try:
        path = draw(tmp_path / "av1.mp4", frames=5, encoder="libsvtav1", options={"preset": "12"})
    except av.FFmpegError:
        pytest.skip("this PyAV has no AV1 encoder")
    clip = read_video(path, frames=5, reader=reader)
    assert numbers(clip.frames) == list(range(5)) and clip.reader.startswith("pyav: ")
    assert reader != "decord" or "has no AV1" in clip.reader


@pytest.mark.parametrize(("reader", "module", "package"), [("decord", "decord", "decord"), ("pyav", "av", "av")])
def test_a_reader_that_is_not_installed_says_what_to_install(monkeypatch, reader, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        probe(BBB, reader)


def test_decord_reads_without_pyav_and_refuses_times_that_do_not_ascend(clips, monkeypatch, tmp_path):
    expected = read_video(BBB, frames=5)
    with av.open(str(tmp_path / "b.avi"), "w") as out:  # its packets carry no time of showing
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuv420p", {"bf": "2"}
        for level in range(30):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), level * 8, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    monkeypatch.setitem(sys.modules, "av", None)
    clip = read_video(BBB, frames=5)
    assert torch.equal(clip.frames, expected.frames) and clip.reader == "decord: PyAV is not installed"
    with pytest.raises(UserError, match="times that do not ascend: pip install av"):
        read_video(tmp_path / "b.avi", frames=5)


def test_decord_killed_by_a_file_costs_that_file_alone(clips, tmp_path):
    data = bytearray(clips["h264"].read_bytes())
    at = data.find(b"stts") + 8
    data[at : at + 4] = struct.pack(">I", 0x7FFFFFFF)  # decord aborts on this number of entries
    (tmp_path / "counts.mp4").write_bytes(data)
    try:
        clip = read_video(tmp_path / "counts.mp4", frames=5, reader="decord")
        assert clip.reader.startswith("pyav: decord")
    except UserError as error:
        assert "damaged" in str(error)
    assert read_video(clips["h264"], frames=5, reader="decord").reader == "decord: as asked"


def test_decord_that_hangs_is_ended_and_the_file_read_by_pyav(clips, monkeypatch):
    monkeypatch.setattr(decord_process, "PATIENCE", 0.2)
    monkeypatch.setattr(DecordProcess, "_ask", asked_nothing)
    clip = read_video(clips["h264"], frames=5, reader="decord")
    assert "the file crashed" in clip.reader and numbers(clip.frames) == [0, 18, 36, 54, 72]


def asked_nothing(self: DecordProcess, words: dict[str, object]) -> None:
    """Start a process that is never asked anything, and so says nothing."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_decord_clip_given_up_midway_leaves_no_answer_behind(clips):
    process = DecordProcess.shared()
    pictures = process.frames(clips["h264"], [0, 30, 60])
    next(pictures)
    pictures.close()
    assert numbers(read_video(clips["mkv"], frames=2, reader="decord").frames) == [0, 45]


# ---- what the containers say, and what they are -----------------------------------------------------------------------


def test_what_is_appended_to_a_file_does_not_make_it_truncated(clips, tmp_path):
    for number, tail in enumerate((b"TAGsome title", b"TAG" + bytes(125), b"\0" * 100, b"LYRICSBEGIN and more", b"x")):
        for kind in ("h264", "moov_last", "avi", "mkv"):
            path = tmp_path / f"{number}{clips[kind].name}"
            path.write_bytes(clips[kind].read_bytes() + tail)
            assert numbers(read_video(path, frames=3).frames) == [0, 30, 60], (kind, tail)


def test_a_length_that_was_not_known_when_it_was_written_is_no_length(clips, tmp_path):
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0):
        data = bytearray(clips["avi"].read_bytes())
        data[4:8] = struct.pack("<I", size)
        (tmp_path / "piped.avi").write_bytes(data)
        assert numbers(read_video(tmp_path / "piped.avi", frames=3).frames) == [0, 30, 60]
    data = bytearray(clips["moov_last"].read_bytes())
    at = data.find(b"mdat") - 4
    assert data[at : at + 4] != b"\0\0\0\0"
    with pytest.raises(UserError, match="is truncated"):  # a box that is known, and runs past the end
        (tmp_path / "cut.mp4").write_bytes(data[: at + 100])
        read_video(tmp_path / "cut.mp4", frames=3)


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "concat:a.mp4", "a%03d.mp4", "-i.mp4", "pipe:0", "a b#c?d=e&f.mp4", "Ä 東京.mp4"]
)
@pytest.mark.parametrize("reader", ["auto", "decord"])
def test_any_name_is_a_name(clips, tmp_path, monkeypatch, name, reader):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(clips["h264"].read_bytes())
    assert numbers(read_video(name, frames=3, reader=reader).frames) == [0, 30, 60]


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), Path("/dev/null")):
        for reader in NAMES:
            with pytest.raises(UserError, match="is a pipe, a socket or a device, not a video file"):
                probe(path, reader)


@pytest.mark.parametrize("reader", NAMES)
def test_files_that_name_other_files_or_addresses_are_refused_and_nothing_is_opened(clips, tmp_path, reader):
    os.mkfifo(tmp_path / "fifo.ts")  # whoever opens it waits for ever
    lists = {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfifo.ts\n#EXT-X-ENDLIST\n",
        "b.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "c.txt": f"ffconcat version 1.0\nfile '{clips['h264'].name}'\n",
        "d.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="not a video"):
            probe(tmp_path / name, reader)


def two_streams(path: Path, sizes: list[int], marked: int | None) -> Path:
    """Write a Matroska file with a stream per size, each of one grey level, 100 times its index."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("mpeg4", rate=25) for _ in sizes]
        for place, (stream, side) in enumerate(zip(streams, sizes, strict=True)):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            stream.disposition = av.stream.Disposition.default if place == marked else av.stream.Disposition(0)
        for _ in range(20):
            for place, (stream, side) in enumerate(zip(streams, sizes, strict=True)):
                picture = np.full((side, side, 3), 100 * place, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("sizes", "marked", "shown"), [([64, 96], 1, 1), ([64, 96], None, 1), ([96, 64], 1, 1), ([96, 64], None, 0)]
)
def test_of_several_streams_all_take_the_default_one_else_the_largest(tmp_path, sizes, marked, shown):
    path = two_streams(tmp_path / "two.mkv", sizes, marked)
    for reader in NAMES:
        clip = read_video(path, frames=4, reader=reader)
        assert clip.frames.shape[2:] == (sizes[shown], sizes[shown]) and clip.reader.startswith("pyav")
        assert abs(float(clip.frames.float().mean()) - 100 * shown) < 8
    motion = read_stream(clip.origin).motion
    assert motion.shape[1:] == (sizes[shown] // 8, sizes[shown] // 8)


@pytest.mark.parametrize(
    "stamps", [(0, None, 2, 3), (0, 2, 1, 3), (0, 0, 0, 0), (0, 1, 2, 2**60), (None,) * 4, (0, 10**9, 2 * 10**9, 3 * 10**9)]
)
def test_times_that_no_video_has_are_not_used(stamps):
    facts = Facts(
        kind="avi", fps=10, base=1.0, codec="h264", pixels="yuv420p", streams=1, orientation=Orientation(), width=64, height=64
    )
    assert facts.times(stamps) == pytest.approx((0.0, 0.1, 0.2, 0.3))
    assert facts.times((5, 6, 7, 20)) == (0.0, 1.0, 2.0, 15.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "pyaw"}, "reader must be auto or decord or pyav, got 'pyaw'. Did you mean \"pyav\"?"),
        ({"sampling": "unifrom"}, "unknown sampling.*uniform, qwen, endpoints"),
        ({"frames": 4, "fps": 1.0}, "cannot both be set"),
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


def test_more_frames_than_memory_holds_are_refused_before_it_is_taken(clips, monkeypatch):
    monkeypatch.setattr(pictures, "virtual_memory", lambda: SimpleNamespace(available=20 * 3 * 64 * 128))
    assert len(read_video(clips["h264"], frames=20).frames) == 20
    with pytest.raises(UserError, match="21 frames of 128x64 take 0.0 GiB, but 0.0 GiB are free: take fewer"):
        read_video(clips["h264"], frames=21)


# ---- files that a review made: each was shown other frames than FFmpeg shows ------------------------------------------


def sequential(path: Path) -> np.ndarray:
    """Decode all frames from start to end in one thread, converted by FFmpeg's filters."""
    shown, graph = [], None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        for frame in container.decode(stream):
            if graph is None:
                graph = av.filter.Graph()
                words = {"width": frame.width, "height": frame.height, "format": frame.format.name}
                source = graph.add_buffer(**words, time_base=frame.time_base)
                graph.link_nodes(source, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
            graph.vpush(frame)
            shown.append(graph.vpull().to_ndarray())
    return np.stack(shown)


def moving(path: Path, encoder: str = "libx264", pixels: str = "yuv420p", **options: str) -> Path:
    """Make fifty frames of moving noise, so that no two are alike."""
    noise = np.random.default_rng(0).integers(0, 255, (96, 400, 3), np.uint8)
    noise = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 128, 96, pixels, options
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, number * 5 : number * 5 + 128]), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refresh.mp4", {"bf": "2", "x264-params": "intra-refresh=1:keyint=20:scenecut=0"}),
        ("refresh.mkv", {"bf": "2", "x264-params": "intra-refresh=1:keyint=20:scenecut=0"}),
        ("interlaced.mp4", {"g": "10", "x264-params": "tff=1"}),
        ("deep.mp4", {"encoder": "libx265", "pixels": "yuv420p10le", "x265-params": "log-level=none:keyint=10"}),
        ("pyramid.mp4", {"bf": "5", "g": "15", "x264-params": "b-pyramid=normal:open-gop=1"}),
    ],
)
def test_some_frames_are_those_of_reading_all_in_every_pixel_on_any_number_of_cores(tmp_path, monkeypatch, name, words):
    path = moving(tmp_path / name, **words)
    right = sequential(path)
    for cores, count in product((1, 2, 16), (1, 5, 13, 50)):
        monkeypatch.setattr(readers, "_cores", lambda cores=cores: cores)
        clip = read_video(path, frames=count)
        assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), right[list(clip.index)]), (cores, count)


def test_damage_that_a_decoder_conceals_looks_the_same_on_any_number_of_cores(tmp_path, monkeypatch):
    data = bytearray(moving(tmp_path / "whole.mp4", g="10", bf="2").read_bytes())
    start, chance = data.find(b"mdat"), np.random.default_rng(3)
    for place in chance.integers(start + 2000, start + 12000, 6):
        data[place] ^= 16
    path = tmp_path / "spoiled.mp4"
    path.write_bytes(data)
    right = sequential(path)
    assert len(right) == 50 and not np.array_equal(right, sequential(tmp_path / "whole.mp4"))
    for cores in (1, 4, 16):
        monkeypatch.setattr(readers, "_cores", lambda cores=cores: cores)
        for count in (5, len(right)):
            clip = read_video(path, frames=count)
            assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), right[list(clip.index)])


def test_frames_of_avi_have_the_times_they_are_shown_at(tmp_path):
    path = moving(tmp_path / "b.avi", bf="2", g="10")
    clip = read_video(path, frames=50)
    assert clip.times == pytest.approx([number / 10 for number in range(50)], abs=1e-3) and clip.source_fps == pytest.approx(10)


def test_an_interrupt_leaves_no_answer_of_decord_behind(clips, monkeypatch):
    process, hear = DecordProcess.shared(), DecordProcess._hear
    process.open(clips["h264"])

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DecordProcess, "_hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.open(clips["mkv"])
    monkeypatch.setattr(DecordProcess, "_hear", hear)
    assert len(process.open(clips["one"])[0]) == 1


class Older:
    """A stream or a codec of PyAV 15, which lacks two names."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name in ("field_order", "index_entries"):
            raise AttributeError(name)
        value = getattr(self.inner, name)
        return Older(value) if name == "codec_context" else value


def test_files_are_counted_where_pyav_does_not_tell_their_field_order():
    path = find_clip("synthetic_1")
    size = path.stat().st_size
    with opened(path) as (container, stream):
        packets = Packets.read(container, stream, size)
        assert packets.stamped(stream) and not packets.stamped(Older(stream))
        assert not packets.incomplete(container, Older(stream), size)
