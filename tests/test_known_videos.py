"""A file that is known is not decoded again; one that was replaced or written is. Samples of a video follow each other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from time import time_ns

import pytest
import torch
from session_pairs import session

from specvlm.app.samples import QUESTIONS, windows
from specvlm.errors import UserError
from specvlm.models.known_videos import KnownVideos
from specvlm.strategies import Sample
from specvlm.types.pixels import LateVideo, PixelDigest, hash_of, pixel_digest
from specvlm.video.clips import find_clip
from specvlm.video.video import read_video


def aged(path: Path, seconds: int = 60) -> None:
    """Make a file look as if it had not been written just now."""
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - seconds * 10**9))


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr("specvlm.models.known_videos.RACY_NS", 0)  # times of change cannot be set
    return KnownVideos()


def getter(known, path, decoded, frames=4):
    target = session("qwen2_5_vl").target

    def sample():
        decoded.append(path.name)
        return read_video(path, frames=frames)

    return known.get(target, path, frames, sample)


@pytest.mark.slow
def test_a_known_file_is_decoded_only_for_its_pixels(known, tmp_path):
    path, decoded = tmp_path / "a.mp4", []
    shutil.copy(find_clip("synthetic_1"), path)
    first, again = getter(known, path, decoded), getter(known, path, decoded)
    assert decoded == ["a.mp4"] and isinstance(again.video, LateVideo) and "pixels" not in again.video
    assert again.grid == first.grid and again.frames == 4 and pixel_digest(again.video) == pixel_digest(first.video)
    assert torch.equal(again.video["pixels"], first.video["pixels"]) and len(decoded) == 2
    assert getter(known, path, decoded, frames=2).frames == 2 and len(decoded) == 3  # other frames are another video


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replaced", "written", "touched"])
def test_a_file_that_has_changed_under_its_name_is_read_anew(way, known, tmp_path):
    path, decoded = tmp_path / "a.mp4", []
    shutil.copy(find_clip("synthetic_1"), path)
    first = getter(known, path, decoded)
    late = getter(known, path, decoded)
    if way == "replaced":
        shutil.copy(find_clip("synthetic_2"), tmp_path / "b.mp4")
        os.replace(tmp_path / "b.mp4", path)
    elif way == "written":
        path.write_bytes(find_clip("synthetic_2").read_bytes())
    else:
        aged(path)
    second = getter(known, path, decoded)
    assert len(decoded) == 2 and (pixel_digest(second.video) == pixel_digest(first.video)) == (way == "touched")
    if way != "touched":
        with pytest.raises(UserError, match=r"a\.mp4 has changed since it was first read"):
            late.video["pixels"]


@pytest.mark.slow
def test_a_video_that_was_remembered_wrongly_is_forgotten_once_its_pixels_are_seen(known, tmp_path):
    path, decoded = tmp_path / "a.mp4", []
    shutil.copy(find_clip("synthetic_1"), path)
    getter(known, path, decoded)
    (key,) = known._known
    known._known[key] = known._known[key]._replace(digest="other")
    with pytest.raises(UserError, match="ask again"):
        getter(known, path, decoded).video["pixels"]
    assert not known._known and "pixels" in getter(known, path, decoded).video


@pytest.mark.slow
def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path, monkeypatch):
    path, known = tmp_path / "a.mp4", KnownVideos()
    shutil.copy(find_clip("synthetic_1"), path)
    os.utime(path, ns=(0, time_ns() + 10**7))  # as if within the same tick of a coarse clock
    monkeypatch.setattr("specvlm.models.known_videos.RACY_NS", 10**12)
    getter(known, path, [])
    assert not known._known


def test_a_digest_is_remembered_until_a_value_changes():
    video = {"pixels": torch.randn(3, 4), "thw": (1, 2, 3), "digest": PixelDigest(), "origin": object()}
    first = pixel_digest(video)
    assert first == pixel_digest(video) == hash_of(video)
    video["pixels"][0, 0] += 1
    second = pixel_digest(video)
    other = {**video, "thw": (3, 2, 1)}
    assert len({first, second, pixel_digest(other), pixel_digest(video | {"pixels": video["pixels"].double()})}) == 4
    with torch.inference_mode():  # whose tensors do not count their changes
        made = {"pixels": torch.zeros(3), "digest": PixelDigest()}
        before = pixel_digest(made)
        made["pixels"][1] = 1
        assert pixel_digest(made) != before


def test_large_tensors_are_hashed_as_small_ones_by_all_their_bytes(monkeypatch):
    monkeypatch.setattr("specvlm.types.pixels.PIECE", 64)
    pixels = torch.arange(1000, dtype=torch.float32)
    digests = {hash_of({"pixels": pixels})}
    for at in (0, 17, 500, 999):
        changed = pixels.clone()
        changed[at] += 0.5
        digests.add(hash_of({"pixels": changed}))
    assert len(digests) == 5 and hash_of({"pixels": pixels.view(10, 100)}) not in digests


def samples(*videos: str) -> list[Sample]:
    return [Sample(str(number), Path(video), "?") for number, video in enumerate(videos)]


@pytest.mark.parametrize(
    ("videos", "size", "found"),
    [
        ("abc", 1, [[0], [1], [2]]),
        ("abcde", 2, [[0, 1], [2, 3], [4]]),
        ("abab", 1, [[0, 2], [1, 3]]),
        ("abcabc", 3, [[0, 3, 1, 4], [2, 5]]),
        ("aab", 3, [[0, 1, 2]]),
    ],
)
def test_samples_of_a_video_follow_each_other_and_a_window_ends_with_a_video(videos, size, found):
    assert windows(samples(*videos), size) == found


def test_a_video_with_many_questions_is_cut():
    found = windows(samples(*["a"] * (2 * QUESTIONS + 1), "b"), 1)
    assert [len(window) for window in found] == [QUESTIONS, QUESTIONS, 1, 1]
    assert sorted(index for window in found for index in window) == list(range(2 * QUESTIONS + 2))
