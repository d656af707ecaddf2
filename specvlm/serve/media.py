"""Read videos and images of a request: data URLs, files below allowed folders, and web addresses if enabled."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image
from torch import Tensor

from specvlm.errors import UserError, line, message
from specvlm.serve.chat_request import ChatRequest
from specvlm.serve.errors import ApiError, bad
from specvlm.serve.fetch import fetched
from specvlm.serve.read_process import Limits
from specvlm.serve.reading import read_clip
from specvlm.serve.settings import Settings
from specvlm.session.inputs import frames_of
from specvlm.session.session import Session
from specvlm.video.clips import FOLDER, names
from specvlm.video.memory import BytesFile, clip_from_frames, picture
from specvlm.video.picture_files import FORMATS
from specvlm.video.video import Clip, Processed

DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+=-]+)*?)(;base64)?,", re.ASCII | re.IGNORECASE)
CLIP = "embedded:"  # scheme of the clips that come with specvlm
NO_FILE = "no such file below the folders that this server reads: see its key folders"


@dataclass
class Media:
    """The messages of a request with clips and pictures in them.

    Attributes:
        messages: Messages in the session's form.
        clips: The videos, in order.
        pictures: The images, in order.
        size: Bytes of all frames and images, before they are resized.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    clips: list[Clip | Processed] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    size: int = 0


class MediaReader:
    """Reads the videos and images of requests. Used from many threads.

    Args:
        session: Session whose target decides how frames are sampled, and whose options choose the video reader.
        settings: Limits, folders, and whether addresses are fetched.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session, self._settings, self._roots = session, settings, settings.roots

    def read(self, request: ChatRequest) -> Media:
        """Read all media of a request. Raises ApiError for one that cannot be used."""
        found, count = Media(), 0
        for at, message_of in enumerate(request.messages):
            content = message_of["content"]
            if isinstance(content, str):
                found.messages.append(message_of)
                continue
            parts = []
            for number, part in enumerate(content):
                count += part["type"] != "text"
                if count > self._settings.max_media:
                    raise bad(f"more than {self._settings.max_media} videos and images", "messages", "too_many_media")
                parts.append(self._part(part, request, found, f"messages.{at}.content.{number}"))
            found.messages.append(message_of | {"content": parts})
        return found

    def _part(self, part: dict[str, Any], request: ChatRequest, found: Media, where: str) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        try:
            if part["type"] == "image":
                found.pictures.append(self._picture(self._bytes(part["image"]), found))
                return {"type": "image", "image": found.pictures[-1]}
            left = self._settings.max_frames - sum(map(frames_of, found.clips))
            clip = self._video(part["video"], request, left, found)
        except ApiError as error:
            error.param = error.param or where
            raise
        except (UserError, OSError) as error:
            raise bad(message(error), where, "bad_media") from None
        if frames_of(clip) > left:
            most = self._settings.max_frames
            raise bad(f"the videos have more than {most} frames: ask for fewer with num_frames", where, "too_many_frames")
        found.clips.append(clip)
        return {"type": "video", "video": clip}

    def _picture(self, content: bytes, found: Media) -> Tensor:
        """Read an image or a frame. Checks its size, and that of the whole request, before it is decoded."""
        most = self._settings.max_side_pixels
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > most:
                    raise bad(f"an image of {opened.width}x{opened.height}: at most {most:,} pixels", code="image_too_large")
                self._count(opened.width * opened.height * 3, found)
                return picture(opened)
        except Image.DecompressionBombError:
            raise bad(f"the image has more than {most:,} pixels", code="image_too_large") from None
        except (OSError, ValueError, SyntaxError) as error:
            raise bad(f"the image cannot be read ({line(str(error))[:120]}): expected {', '.join(FORMATS)}") from None

    def _count(self, size: int, found: Media) -> None:
        """Count bytes of frames and images. Raises ApiError if the request has too many in total."""
        found.size += size
        if found.size > self._settings.max_size:
            told = f"the frames and images of a request take more than {self._settings.max_clip_mib} MiB"
            raise bad(f"{told}: send fewer or smaller ones", code="media_too_large")

    def _video(self, url: str, request: ChatRequest, left: int, found: Media) -> Clip | Processed:
        """Read a video. Frames given as JPEG images, as vLLM takes them, are used unchanged.

        A file that was read before is not decoded again, unless the request asks to see its frames.
        """
        if url[:16].lower().startswith("data:video/jpeg;"):
            parts = url.partition(",")[2].split(",", left + 1)[: left + 1]
            frames = [self._picture(_unpacked(one), found) for one in parts]
            return clip_from_frames(frames, **({"fps": request.sampling["fps"]} if "fps" in request.sampling else {}))
        sampling = {"frames": None, "fps": None} | request.sampling if request.sampling else {}
        options = self._session.options.asked(sampling)
        size = self._settings.max_size - found.size
        limits = Limits(left, self._settings.max_side_pixels, size, self._settings.read_timeout)
        target, known = self._session.target, self._session.videos
        with self._file(url) as path:
            sample = partial(read_clip, target, path, options, limits)
            if known is None or request.explain or self._local(url) is None:
                clip = sample()
                self._count(clip.frames.nbytes, found)
                return clip
            how = (options.frames, options.fps, options.reader, limits.frames)  # a limit may change what is sampled
            made = known.get(target, path, how, sample, request.options.get("max_pixels", options.max_pixels))
            self._count(made.nbytes, found)
            return made

    @contextmanager
    def _file(self, url: str) -> Iterator[Path]:
        """Yield the path of a video: the local file that the URL names, or a temporary file with the URL's content."""
        if (path := self._local(url)) is not None:
            yield path
            return
        with BytesFile(self._bytes(url)) as path:
            yield path

    def _bytes(self, url: str) -> bytes:
        """Return the content of a URL. Raises ApiError if the URL is not allowed or its content is too large."""
        if (path := self._local(url)) is not None:
            return _content(path, self._settings.max_body)
        if url[:5].lower() == "data:":
            return _data(url)
        if re.match("https?://", url[:8], re.IGNORECASE):
            if not self._settings.fetch:
                raise bad("this server does not fetch addresses: send a data: URL", code="fetch_is_off")
            settings = self._settings
            return fetched(url, settings.max_body, settings.read_timeout, settings.fetch_hosts)
        raise bad(f"{line(url)[:60]}: expected a data:, file: or http(s): URL", code="bad_url")

    def _local(self, url: str) -> Path | None:
        """The local file of a URL; None for other URLs. Raises ApiError for a file that may not be read."""
        if url.startswith(CLIP):
            if (name := url.removeprefix(CLIP)) not in names():
                raise bad(f"{line(url)[:60]}: no such clip; choose from {', '.join(names())}", code="no_such_file")
            return FOLDER / f"{name}.mp4"
        if url[:5].lower() != "file:":
            return None
        return _allowed(url, self._roots)


def _allowed(url: str, roots: tuple[Path, ...]) -> Path:
    """Resolve a file URL. A file outside the folders gets the same error as a missing one.

    Raises ApiError unless it is a regular file below one of the folders, links followed.
    """
    refused = bad(NO_FILE, code="no_such_file")
    try:
        parts = urlsplit(url)
        name = os.fsdecode(unquote_to_bytes(parts.path))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in name or not name.startswith("/"):
            raise refused
        path = Path(os.path.realpath(name, strict=True))
        inside = any(path.is_relative_to(root) for root in roots)
        if not inside or not stat.S_ISREG(path.stat().st_mode):
            raise refused
    except (OSError, ValueError):
        raise refused from None
    return path


def _content(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes. Refuses a symbolic link: it was put there after the path was resolved."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise bad(f"the file has more than {most:,} bytes", code="media_too_large")
    return found


def _data(url: str) -> bytes:
    """Decode a data URL."""
    head = DATA.match(url[:300])
    if not head:
        raise bad("this data: URL cannot be read: expected data:TYPE;base64,…", code="bad_url")
    body = url[head.end() :]
    return _unpacked(body) if head[3] else unquote_to_bytes(body)


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad("the data of this URL is not base64", code="bad_url") from None
