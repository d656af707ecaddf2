"""Videos and images of requests: the server's own sampling, and what one request may change for others."""

from __future__ import annotations

import base64
from io import BytesIO

import av
import pytest
from PIL import Image
from serving import FEW, data_url, served
from session_pairs import QUESTION, new_session, session
from test_serve import error_of, picture_url

import specvlm
from specvlm.models.known_videos import KnownVideos
from specvlm.serve.chat_request import ChatRequest
from specvlm.serve.errors import ApiError
from specvlm.serve.media import MediaReader
from specvlm.serve.read_process import Limits, bounded, described
from specvlm.serve.settings import Settings
from specvlm.video.av_file import LISTS
from specvlm.video.clips import find_clip
from specvlm.video.video import read_video

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("own", [{"frames": 4}, {"fps": 1.0}])
def test_a_server_that_samples_by_its_own_rule_takes_videos_of_every_kind(own):
    with served(of=new_session(**own)) as one:
        want = session().generate(QUESTION, videos="synthetic_1", max_new_tokens=8, **own)
        for url in ("embedded:synthetic_1", data_url()):
            found = one.ask(video=url, media_io_kwargs=None).json()
            assert found["choices"][0]["message"]["content"] == want.text
            assert found["specvlm"]["frames"] == want.statistics["frames"]
            for sampling, count in [({"fps": 0.5}, None), ({"num_frames": 6}, 6)]:
                given = one.ask(video=url, max_tokens=1, media_io_kwargs={"video": sampling}).json()
                assert count in (None, given["specvlm"]["frames"])
        raw = ",".join(picture_url((64, 64), "JPEG", (40 * k, 90, 90)).partition(",")[2] for k in range(4))
        found = one.ask(video=f"data:video/jpeg;base64,{raw}", media_io_kwargs={"video": {"fps": 2}}).json()
        assert found["specvlm"]["frames"] == 4


@pytest.fixture
def remembering(monkeypatch):
    """A session that remembers files."""
    monkeypatch.setattr("specvlm.models.known_videos.RACY_NS", 0)
    monkeypatch.setattr(session(), "videos", KnownVideos())
    return session()


def request_of(url="embedded:synthetic_1", count=1, sampling=None, **options):
    parts = [{"type": "video", "video": url}] * count
    return ChatRequest("m", [{"role": "user", "content": parts}], options, {"frames": 4} if sampling is None else sampling)


def test_what_a_request_sampled_under_its_limits_is_not_the_video_of_others(remembering):
    tight, wide = (MediaReader(remembering, Settings(max_frames=most)) for most in (4, 768))
    first = tight.read(request_of(sampling={"fps": 8.0})).clips[0]
    second = wide.read(request_of(sampling={"fps": 8.0})).clips[0]
    assert first.frames <= 4 < second.frames
    again = wide.read(request_of(sampling={"fps": 8.0})).clips[0]
    assert again.frames == second.frames and len(again.video["pixels"])


def test_most_pixels_of_a_request_hold_for_remembered_videos_too(remembering):
    reader = MediaReader(remembering, Settings())
    grids = [len(reader.read(request_of(**given)).clips[0].grid) for given in ({}, {"max_pixels": 28 * 28 * 4}, {})]
    assert grids[0] == grids[2] > grids[1]
    with served(of=remembering) as one:
        given = {"mm_processor_kwargs": {"max_pixels": 28 * 28 * 4}}
        want = session().generate(
            QUESTION,
            videos=specvlm.read_video(specvlm.video.clips.find_clip("synthetic_1"), frames=4),
            max_new_tokens=8,
            max_pixels=28 * 28 * 4,
        )
        for _ in range(2):
            found = one.ask(**given, **FEW).json()
            assert found["choices"][0]["message"]["content"] == want.text
            assert found["specvlm"]["video_tokens"] == want.statistics["video_tokens"]


def test_the_message_of_a_changed_file_does_not_name_it(remembering):
    with served(of=remembering) as one:
        assert one.ask(max_tokens=1).status_code == 200
        known = remembering.videos._known
        for key in known:
            known[key] = known[key]._replace(digest="other")
        text = error_of(one.ask(max_tokens=2))["message"]
        assert text.startswith("the video has changed") and "/" not in text
        assert one.ask(max_tokens=2).status_code == 200


def small_url(kind, size=(600, 400)):
    """A picture whose file is small beside its pixels."""
    file = BytesIO()
    Image.new("RGB", size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_all_frames_and_images_of_a_request_are_measured_together_before_they_are_decoded(monkeypatch):
    frame, image = small_url("JPEG"), {"type": "image", "image": "data:image/webp;base64," + small_url("WEBP")}  # 720 kB each
    frames = {"type": "video", "video": "data:video/jpeg;base64," + ",".join([frame] * 2)}
    clip = {"type": "video", "video": "embedded:synthetic_1"}  # 4 frames of 224x224 are 600 kB
    read, decoded = MediaReader(session(), Settings(max_clip_mib=2)).read, []
    monkeypatch.setattr("specvlm.serve.media.picture", lambda one: decoded.append(one) or specvlm.video.memory.picture(one))

    def asked(*parts):
        return read(ChatRequest("m", [{"role": "user", "content": list(parts)}], {}, {"frames": 4}))

    assert asked(frames, clip).size <= 2 * 2**20 and asked(image, image, clip).size <= 2 * 2**20
    many = {"type": "video", "video": "data:video/jpeg;base64," + ",".join([frame] * 700)}
    for parts in ((many,), (image,) * 8, (frames, image), (clip, clip, image, image), (image, image, clip, clip)):
        decoded.clear()
        with pytest.raises(ApiError, match="MiB: (send|ask for) fewer"):
            asked(*parts)
        assert len(decoded) <= 2
    with served("max_clip_mib=1") as one:
        found = error_of(one.ask(video=many["video"]))
        assert found["code"] == "media_too_large" and found["param"] == "messages.0.content.0"


def test_every_file_of_a_request_is_opened_as_one_that_may_name_no_other(monkeypatch):
    opened, real = [], av.open

    def spy(path, *given, **options):
        opened.append(options["options"])
        return real(path, *given, **options)

    monkeypatch.setattr(av, "open", spy)
    limits, path = Limits(frames=8, pixels=10**6, size=2**24, seconds=20), find_clip("synthetic_1")
    info = described(path, "pyav", limits)
    assert len(opened) >= 2  # its size, before anything is decoded; then the rest
    assert len(read_video(str(path), reader="pyav", **bounded(info, {"frames": 4}, limits)).frames) == 4 and len(opened) >= 3
    for options in opened:
        assert set(options) == {"format_whitelist", "protocol_whitelist"} and options["protocol_whitelist"] == "file"
        allowed = set(options["format_whitelist"].split(","))
        assert {"mov", "matroska", "avi"} & allowed and not allowed & LISTS
    assert {"hls", "concat", "sdp", "rtsp"} <= LISTS & av.formats_available  # they are left out, not unknown
