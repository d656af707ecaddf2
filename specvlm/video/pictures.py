"""Convert decoded frames to the pixels of a clip: upright, RGB, all of the same size, if they fit in memory."""

from fractions import Fraction
from pathlib import Path
from threading import Lock, local
from typing import Any

import numpy as np
import torch
from psutil import virtual_memory
from torch import Tensor

from specvlm.errors import UserError
from specvlm.video.av_file import Orientation

# Pixel formats that PyAV itself converts as the ffmpeg tool does, if sides are even and the frame is not interlaced.
PLAIN = frozenset(("yuv420p", "yuvj420p", "rgb24", "gray"))


class Pictures:
    """Collects the pixels of the wanted frames. Several threads may store pictures at once.

    Attributes:
        pixels: (count, 3, H, W) uint8 RGB; an empty tensor until the first picture is stored.
    """

    def __init__(self, path: Path, count: int, orientation: Orientation | None = None) -> None:
        """Prepare for `count` frames of a file. orientation: used for frames that state none; by default as stored."""
        self._path, self._count, self._made = path, count, Lock()
        self._orientation, self._colours = orientation, Colours()
        self.pixels = torch.empty(0)

    def put(self, place: int, frame: Any, orientation: Orientation | None = None) -> None:
        """Store a frame of PyAV as `pixels[place]`. orientation: used if the frame states none."""
        self.put_array(place, self.shown(frame, orientation))

    def shown(self, frame: Any, orientation: Orientation | None = None) -> np.ndarray[Any, Any]:
        """Convert a frame of PyAV to (H, W, 3) uint8 RGB, rotated and mirrored for display.

        orientation: Used if the frame states none; by default the one given to the constructor.
        """
        turned = Orientation.of(frame, self._path, orientation or self._orientation)
        return turned.apply(self._colours.convert(frame))

    def put_array(self, place: int, picture: np.ndarray[Any, Any]) -> None:
        """Store a picture (H, W, 3) as `pixels[place]`.

        Raises:
            UserError: The picture's size differs from the first one's, or there is not enough memory for all frames.
        """
        height, width = picture.shape[:2]
        with self._made:
            if not len(self.pixels):
                self.pixels = self._room(height, width)
        if self.pixels.shape[2:] != (height, width):
            raise UserError(f"{self._path}: the picture size changes within the video, to {width}x{height}")
        np.copyto(self.pixels[place].numpy().transpose(1, 2, 0), picture)

    def _room(self, height: int, width: int) -> Tensor:
        """Allocate the pixels of all frames. Raises UserError if there is not enough memory."""
        needed, free = self._count * 3 * height * width, virtual_memory().available
        frames = f"{self._count} frames of {width}x{height} take {needed / 2**30:.1f} GiB"
        if needed > free:
            raise UserError(f"{self._path}: {frames}, but {free / 2**30:.1f} GiB are free: take fewer (frames=…)")
        try:
            return torch.empty(self._count, 3, height, width, dtype=torch.uint8)
        except RuntimeError:  # a memory limit of this process
            raise UserError(f"{self._path}: {frames}, more than this process may use: take fewer (frames=…)") from None


class Colours:
    """Converts frames to RGB as the ffmpeg tool does. Thread-safe."""

    def __init__(self) -> None:
        self._own = local()

    def convert(self, frame: Any) -> np.ndarray[Any, Any]:
        """Convert a frame of PyAV to (H, W, 3) uint8."""
        even = not (frame.width % 2 or frame.height % 2)
        if frame.format.name in PLAIN and even and not frame.interlaced_frame:
            return frame.to_ndarray(format="rgb24")  # gives the same pixels faster
        graph = self._graph(frame)
        graph.vpush(frame)
        return graph.vpull().to_ndarray()

    def _graph(self, frame: Any) -> Any:
        """Return the FFmpeg filter graph that converts frames like this one. There is one per thread and kind of frame.

        The graph handles interlacing and chooses a better scaler than PyAV's own conversion.
        """
        import av

        kind = (frame.width, frame.height, frame.format.name, frame.interlaced_frame)
        graphs: dict[Any, Any] = self._own.__dict__.setdefault("graphs", {})
        if kind not in graphs:
            graph = av.filter.Graph()
            words = {"width": frame.width, "height": frame.height, "format": frame.format.name}
            nodes = (graph.add_buffer(**words, time_base=frame.time_base or Fraction(1, 25)), graph.add("format", "rgb24"))
            graph.link_nodes(*nodes, graph.add("buffersink")).configure()
            graphs[kind] = graph
        return graphs[kind]
