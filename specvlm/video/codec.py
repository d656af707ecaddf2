"""Read signals of the compressed video through PyAV: motion vectors, packet sizes and intra-coded frames.

Shapes: T sampled frames; h rows and w columns of cells, each CELL x CELL pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specvlm.errors import UserError
from specvlm.video.av_file import Orientation, WrongIndex, frames_of, opened
from specvlm.video.frame_index import FrameIndex, index_of

CELL = 8  # pixels; blocks with their own vector are rarely smaller


@dataclass(frozen=True)
class Origin:
    """The file that a video was sampled from, and the numbers of its sampled frames.

    Attributes:
        path: The file.
        index: Number of each sampled frame in the file, ascending. Frames are numbered from 0 in display order.
    """

    path: str
    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """Signals of the compressed stream, one entry per sampled frame.

    Entry t covers the frames from just after sampled frame t - 1 up to sampled frame t; entry 0 is the first sampled
    frame alone.

    Attributes:
        motion: (T, h, w) Pixels that each cell moved, after subtracting the median motion of its frame (taken as the
            camera's), summed over the entry's frames. Cells without a vector, and frames of another size than the
            first, add 0.
        size: (T,) Compressed bytes of the entry's frames.
        intra: (T,) Share of the entry's frames that are coded without reference to others.
    """

    motion: Tensor
    size: Tensor
    intra: Tensor


def read_stream(origin: Origin) -> Stream:
    """Read the signals of a video. Decodes the file up to its last sampled frame, with FFmpeg's option `export_mvs`.

    Only some decoders export motion vectors (H.264, MPEG-1, -2 and -4). For others (HEVC, VP8, VP9, AV1) the motion is
    0. Vectors are used as coded, without scaling by the distance of their reference frame.

    Raises:
        UserError: PyAV is not installed, or the file is missing, cannot be read, or holds none of the sampled frames.
    """
    try:
        import av
    except ImportError:
        raise UserError("PyAV is not installed: pip install av") from None
    if not Path(origin.path).is_file():
        raise UserError(f"{origin.path} is not a file")
    path = Path(origin.path)
    index = index_of(path)
    if origin.index[-1] >= len(index):
        index = index_of(path, counted=True)
    try:
        return _read(av, path, origin.index, index)
    except WrongIndex:
        return _read(av, path, origin.index, index_of(path, counted=True))


def _read(av: Any, path: Path, sampled: Sequence[int], index: FrameIndex) -> Stream:
    """Decode the file, and sum the signals of its frames to one entry per sampled frame.

    A frame's place in the file is found by its time stamp, or by counting if the index has no time stamps.

    Raises:
        WrongIndex: A frame's time stamp is not in the index.
        UserError: The file holds none of the sampled frames.
    """
    sample, motion, intra = 0, None, [0.0] * len(sampled)
    starts = [sampled[0], *(place + 1 for place in sampled[:-1])]
    place_of = None if index.stamps is None else {stamp: place for place, stamp in enumerate(index.stamps)}
    with opened(path, flags2="+export_mvs") as (container, stream):
        for count, frame in enumerate(frames_of(container, stream, path)):
            place = count if place_of is None else place_of.get(frame.pts, -1)
            if place < 0:
                raise WrongIndex
            if place > sampled[-1]:
                break
            while place > sampled[sample]:
                sample += 1
            if place < starts[sample]:
                continue
            moved = Orientation.of(frame, path, index.facts.orientation).apply(_moved(av, frame))
            if motion is None:
                motion = np.zeros((len(sampled), *moved.shape), dtype=np.float32)
            if moved.shape == motion.shape[1:]:
                motion[sample] += moved
            intra[sample] += frame.pict_type == av.video.frame.PictureType.I
    if motion is None:
        raise UserError(f"{path} holds none of the sampled frames")
    spans = list(zip(starts, sampled, strict=True))
    return Stream(
        torch.from_numpy(motion),
        torch.tensor([float(sum(index.sizes[start : end + 1])) for start, end in spans]),
        torch.tensor([share / (end - start + 1) for share, (start, end) in zip(intra, spans, strict=True)]),
    )


def _moved(av: Any, frame: Any) -> np.ndarray[Any, Any]:
    """Measure how many pixels each cell moved, after subtracting the frame's median motion; (h, w).

    A cell that several blocks cover moves by the blocks' mean, weighted by area. Cells without a vector get 0.
    """
    rows, columns = -(-frame.height // CELL), -(-frame.width // CELL)
    found = frame.side_data.get(av.sidedata.sidedata.Type.MOTION_VECTORS)
    vectors = None if found is None else found.to_ndarray()
    if vectors is None or not len(vectors):
        return np.zeros((rows, columns), dtype=np.float32)
    # Flip vectors to earlier frames, so that all point forward in time.
    scale = np.maximum(vectors["motion_scale"], 1) * np.where(vectors["source"] < 0, -1.0, 1.0)
    sums = np.zeros((3, rows * columns))
    for width, height in {(int(w), int(h)) for w, h in zip(vectors["w"], vectors["h"], strict=True)}:
        mine = (vectors["w"] == width) & (vectors["h"] == height)
        wide, tall = min(width, CELL), min(height, CELL)
        values = (vectors["motion_x"][mine] / scale[mine], vectors["motion_y"][mine] / scale[mine], np.ones(mine.sum()))
        for dx in range(0, width, CELL):
            for dy in range(0, height, CELL):
                column = (vectors["dst_x"][mine].astype(int) - width // 2 + dx + wide // 2) // CELL
                row = (vectors["dst_y"][mine].astype(int) - height // 2 + dy + tall // 2) // CELL
                cell = row.clip(0, rows - 1) * columns + column.clip(0, columns - 1)
                for total, value in zip(sums, values, strict=True):
                    total += np.bincount(cell, value * (wide * tall / CELL**2), minlength=len(total))
    there = sums[2] > 0
    vector = sums[:2, there] / sums[2, there]
    length = np.zeros(rows * columns, dtype=np.float32)
    length[there] = np.hypot(*(vector - np.median(vector, axis=1, keepdims=True)))
    return length.reshape(rows, columns)
