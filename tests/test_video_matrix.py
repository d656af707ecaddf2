"""The video matrix (campaign/videos.py) can be trusted: its clips are as claimed, and its judge sees wrong frames."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

pytest.importorskip("imageio_ffmpeg", reason="it carries the ffmpeg that makes the clips")

from campaign.videos import right
from videos import judge
from videos.cells import CELLS, MEMBERS
from videos.edits import Maker
from videos.ffmpeg import shown
from videos.judge import Verdict, numbers
from videos.mutate import mutate

from specvlm.video import video
from specvlm.video.frame_index import index_of
from specvlm.video.readers import PyavReader


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("cells"))


def test_every_kind_has_a_member_that_exists():
    assert set(MEMBERS) <= set(CELLS)
    assert len(CELLS) >= 250


# By construction: cut at 2 s of 10 frames a second, with or without the picture that refers to one before; edit lists.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mp4/h264_long/cut", "20-49"),
        ("mp4/h264_long/cut_between", "24-49"),
        ("mp4/h264/edit_twice", "10-29 10-29"),
        ("mp4/h264/edit_skip", "0-9 30-49"),
        ("mp4/hevc_open/cut", "21-49"),
        ("avi/mpeg4_b/whole", "0-49"),
        ("ts/h264_open/headless", "20-49"),
        ("mkv/h264_b/joined", "0-49 0-49"),
    ],
)
def test_ffmpeg_shows_the_frames_that_the_clip_was_made_to_have(make, name, expected):
    assert numbers(shown(make(CELLS[name])).frames) == expected


def test_times_are_those_of_the_frames_not_of_a_constant_rate(make):
    times = np.array(shown(make(CELLS["mkv/h264_b@vfr/whole"])).times)
    wanted = [(5 * frame + 2 * (frame % 3) + 20 * (frame >= 20)) / 50 for frame in range(50)]
    assert np.allclose(times - times[0], wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        ("hflip", lambda plain: plain[:, ::-1]),
        ("vflip", lambda plain: plain[::-1]),
        ("turn90", lambda plain: np.rot90(plain)),
        ("turn90_hflip", lambda plain: np.rot90(plain)[:, ::-1]),  # turned first, then mirrored
        ("matrix_shifted", lambda plain: plain[:, ::-1]),
        ("sei_hflip", lambda plain: plain[:, ::-1]),
    ],
)
def test_clips_are_shown_turned_and_mirrored(make, edit, wanted):
    plain, seen = (shown(make(CELLS[f"mp4/h264_b/{name}"])).frames[7] for name in ("whole", edit))
    assert np.array_equal(seen, wanted(plain))


class Late(PyavReader):
    """Reader that returns each frame's successor after a seek."""

    def decode(self, index):
        return super().decode(index if len(index) > 13 else [min(place + 1, len(self.times) - 1) for place in index])


class Short(PyavReader):
    def __init__(self, *words):
        super().__init__(*words)
        self.times = self.times[:-1]


class Mirrored(PyavReader):
    def decode(self, index):
        return super().decode(index).flip(3)


class Slow(PyavReader):
    def __init__(self, *words):
        super().__init__(*words)
        self.times = tuple(2 * time for time in self.times)


class Backwards(PyavReader):
    def __init__(self, *words):
        super().__init__(*words)
        self.times = (self.times[1], self.times[0], *self.times[2:])


class Dark(PyavReader):
    def decode(self, index):
        return (super().decode(index).int() - 2).clamp(0).to(torch.uint8)


@pytest.mark.parametrize(
    ("reader", "seen"),
    [
        (Late, "not those of reading all"),
        (Short, "49 frames, not 50"),
        (Mirrored, "50 of 50 frames are others"),
        (Slow, "source_fps 5, not 10"),
        (Backwards, "times that do not ascend"),
        (Dark, "50 of 50 frames are others"),
    ],
)
def test_the_judge_sees_what_a_reader_gets_wrong(make, monkeypatch, reader, seen):
    monkeypatch.setattr(video, "open_reader", lambda path, name, counted: reader(path, index_of(path), "lies"))
    path = make(CELLS["mp4/h264_b/whole"])
    verdict = judge._compared(path, shown(path), "auto")
    assert verdict.kind == "WRONG"
    assert seen in verdict.why


def test_a_refusal_is_right_only_where_nobody_knows_the_frames_or_another_reader_is_named(make):
    cell = CELLS["mp4/h264_b/whole"]
    truth = shown(make(cell))
    assert not right(cell, truth, "pyav", Verdict("refused", "damaged"))
    assert not right(cell, truth, "auto", Verdict("refused", "try reader=pyav"))
    assert right(cell, truth, "decord", Verdict("refused", "try reader=pyav"))
    assert right(cell, "no frames", "auto", Verdict("refused", "damaged"))
    assert right(CELLS["mp4/h264_b/turn45"], truth, "auto", Verdict("refused", "only multiples of 90"))
    assert not right(cell, truth, "decord", Verdict("WRONG", "the process ends with -6"))


def test_mutations_follow_from_the_seed_and_leave_a_file(make):
    data = make(CELLS["mp4/h264_b/whole"]).read_bytes()
    one, other = ([mutate(rng, data) for _ in range(60)] for rng in (Random(1), Random(1)))
    assert one == other
    assert all(one) and sum(mutant != data for mutant in one) > 50 and len(set(one)) > 45
