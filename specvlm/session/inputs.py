"""Build the target's prompt from the caller's text, chat messages, videos and images, or from a processor's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from specvlm.errors import UserError, check_choice, explained
from specvlm.models.chat import checked
from specvlm.models.known_videos import KnownVideos
from specvlm.models.video_lm import VideoLM
from specvlm.session.options import Options
from specvlm.types import VideoPrompt
from specvlm.video.clips import find_clip
from specvlm.video.memory import BytesFile, clip_from_frames, detached, picture
from specvlm.video.video import Clip, Processed, probe, read_video

BYTES = (bytes, bytearray, memoryview)
MEDIA = ("video", "image")
ROLES = ("system", "user", "assistant", "tool", "developer")


class Reading(NamedTuple):
    """A prompt, and the number of frames that were read for it; None if the pixels were given already processed."""

    prompt: VideoPrompt
    frames: int | None


@dataclass(frozen=True)
class Source:
    """What `clip_of` needs to read the videos of one call.

    Attributes:
        target: The target.
        options: How videos are sampled.
        known: Remembers files that were read before; None to decode every file.
    """

    target: VideoLM
    options: Options
    known: KnownVideos | None = None


def read(target: VideoLM, prompt: Any, videos: Any, images: Any, options: Options, known: KnownVideos | None = None) -> Reading:
    """Read videos and images and make the prompt.

    Args:
        target: The target.
        prompt: The question; chat messages; the output of the model's Hugging Face processor (with "input_ids"); or a
            `VideoPrompt`. With the last two, give no videos or images.
        videos: A video or several, before the question, or in place of the empty parts of the messages. Each is a path,
            the name of an embedded clip, a file's bytes, an array or a tensor, a list of frames, or a `Clip`.
        images: An image or several: paths, bytes, arrays, tensors or pictures of Pillow.
        options: How videos are sampled.
        known: Remembers files that were read before; None to decode every file.

    Raises:
        UserError: The prompt, a video, an image or an option cannot be used.
    """
    source = Source(target, options, known)
    clips = [clip_of(source, video) for video in _videos(videos)]
    pictures = [
        picture(image) for image in (images if isinstance(images, list | tuple) else [] if images is None else [images])
    ]
    if isinstance(prompt, VideoPrompt) or (isinstance(prompt, Mapping) and "input_ids" in prompt):
        if clips or pictures:
            raise UserError("a processor's inputs hold their videos and images: leave out videos and images")
        return Reading(prompt if isinstance(prompt, VideoPrompt) else processed(target, prompt), None)
    if isinstance(prompt, str):
        count = sum(map(frames_of, clips))
        return Reading(target.prompt(prompt, clips, pictures, options.max_pixels), count)
    if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
        hint = ": put the message into a list" if isinstance(prompt, Mapping) and "role" in prompt else ""
        raise UserError(f"a prompt is a text, a list of messages or a processor's inputs, got a {type(prompt).__name__}{hint}")
    media = {"video": iter(clips), "image": iter(pictures)}
    messages = list(_filled(source, prompt, media))
    for kind, left in media.items():
        if next(left, None) is not None:
            raise UserError(f'the messages have no place for all {kind}s: add a part {{"type": "{kind}"}} for each')
    given = [part["video"] for part in checked(messages) if part["type"] == "video"]
    return Reading(target.chat(messages, options.max_pixels), sum(map(frames_of, given)))


def processed(target: VideoLM, inputs: Mapping[str, Any]) -> VideoPrompt:
    """Build the prompt from the output of the model's Hugging Face processor. Raises UserError if it cannot be used."""
    with explained("the processor's inputs cannot be used"):
        return target.hf_prompt(inputs)


def frames_of(video: Clip | Processed) -> int:
    """Return the number of frames that were read."""
    return video.frames if isinstance(video, Processed) else len(video.frames)


def clip_of(source: Source, video: Any) -> Clip | Processed:
    """Read a video. From a file, sample frames by the options, or by the model family's rule if these set none.

    Raises UserError if the video cannot be read, or if the options ask to sample from frames in memory.
    """
    if isinstance(video, BYTES):
        with BytesFile(video) as path:
            return detached(_sampled(source, path), "a video of bytes")
    options = source.options
    if isinstance(video, str | Path):
        path, sample = find_clip(str(video)), partial(_sampled, source, find_clip(str(video)))
        if source.known is None:
            return sample()
        sampling = (options.frames, options.fps, options.reader)
        return source.known.get(source.target, path, sampling, sample, options.max_pixels)
    if options.frames is not None or options.fps is not None:
        how = "clip_from_frames(frames, fps=…) states their rate"
        raise UserError(f"frames=… and fps=… sample from files; frames in memory are used as they are: {how}")
    return video if isinstance(video, Clip | Processed) else clip_from_frames(video)


def _sampled(source: Source, path: Path) -> Clip:
    """Read a video file, and sample the frames that the target sees."""
    options = source.options
    sampling: dict[str, Any] = {"frames": options.frames, "fps": options.fps}
    if not any(sampling.values()):
        sampling = source.target.sampling(probe(path, options.reader))
    return read_video(path, reader=options.reader, **sampling)


def _videos(given: Any) -> list[Any]:
    """Return the videos of an argument that may be a single one. A list of pictures is one video."""
    if not isinstance(given, list | tuple):
        return [] if given is None else [given]
    frames = bool(given) and all(isinstance(one, Image.Image) or _is_picture(one) for one in given)
    return [list(given)] if frames else list(given)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 3


def _filled(source: Source, messages: Sequence[Any], media: Mapping[str, Iterator[Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages with clips and images in their parts.

    Raises UserError for an unknown role, and for a video or image part that cannot be used. Other faults are left to
    `VideoLM.chat`.
    """
    for message in messages:
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if isinstance(role, str):
            check_choice("the role of a message", role, ROLES)
        if not isinstance(content, list | tuple):
            yield message
        else:
            yield {**message, "content": [_part(source, part, media) for part in content]}


def _part(source: Source, part: Any, media: Mapping[str, Iterator[Any]]) -> Any:
    """Read the video or image of a part, stored under the key "video" or "image" (the part's type) or "path".

    A part with neither takes the next one of `media`. Other parts are returned unchanged.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in MEDIA:
        return part
    if other := sorted(str(key) for key in part.keys() - {"type", "path", kind}):
        raise UserError(f'a part of type {kind} has {", ".join(other)}: expected "{kind}" or "path"')
    given = part.get(kind, part.get("path"))
    if given is not None:
        return {"type": kind, kind: clip_of(source, given) if kind == "video" else picture(given)}
    if (there := next(media[kind], None)) is None:
        raise UserError(f'a part {{"type": "{kind}"}} has no {kind}: put it there, or give it in {kind}s=…')
    return {"type": kind, kind: there}
