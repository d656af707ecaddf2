"""Decoded frames as the pixels of a clip: turned upright, in RGB, of one size, in memory that is there."""

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

PLAIN = frozenset(("yuv420p", "yuvj420p", "rgb24", "gray"))


class Pictures:
    """The result of a decode, filled from several threads; made when the first picture tells its size."""

    def __init__(self, path: Path, count: int, orientation: Orientation | None = None) -> None:
        """orientation: of a frame that does not say how it is turned."""
        self._path, self._count, self._made = path, count, Lock()
        self._orientation, self._colours = orientation, Colours()
        self.pixels = torch.empty(0)

    def put(self, place: int, frame: Any, orientation: Orientation | None = None) -> None:
        """A frame of PyAV. orientation: of a frame that does not say how it is turned."""
        self.put_array(place, self.shown(frame, orientation))

    def shown(self, frame: Any, orientation: Orientation | None = None) -> np.ndarray[Any, Any]:
        """A frame of PyAV as it is shown, (H, W, 3)."""
        turned = Orientation.of(frame, self._path, orientation or self._orientation)
        return turned.apply(self._colours.convert(frame))

    def put_array(self, place: int, picture: np.ndarray[Any, Any]) -> None:
        """(H, W, 3). Raises UserError for another size than that of the first, and where memory would not hold them all."""
        height, width = picture.shape[:2]
        with self._made:
            if not len(self.pixels):
                self.pixels = self._room(height, width)
        if self.pixels.shape[2:] != (height, width):
            raise UserError(f"{self._path}: the picture size changes within the video, to {width}x{height}")
        np.copyto(self.pixels[place].numpy().transpose(1, 2, 0), picture)

    def _room(self, height: int, width: int) -> Tensor:
        needed, free = self._count * 3 * height * width, virtual_memory().available
        frames = f"{self._count} frames of {width}x{height} take {needed / 2**30:.1f} GiB"
        if needed > free:
            raise UserError(f"{self._path}: {frames}, and {free / 2**30:.1f} GiB are free: take fewer (frames=…)")
        try:
            return torch.empty(self._count, 3, height, width, dtype=torch.uint8)
        except RuntimeError:  # a limit on this process
            raise UserError(f"{self._path}: {frames}, more than this process may have: take fewer (frames=…)") from None


class Colours:
    """Converts frames to RGB as the ffmpeg tool does, by any number of threads."""

    def __init__(self) -> None:
        self._own = local()

    def convert(self, frame: Any) -> np.ndarray[Any, Any]:
        """(H, W, 3), uint8."""
        even = not (frame.width % 2 or frame.height % 2)
        if frame.format.name in PLAIN and even and not frame.interlaced_frame:
            return frame.to_ndarray(format="rgb24")  # the same pixels, and quicker
        graph = self._graph(frame)
        graph.vpush(frame)
        return graph.vpull().to_ndarray()

    def _graph(self, frame: Any) -> Any:
        """FFmpeg's filters, which know of interlaced lines and choose a better scaler. One for each thread and kind."""
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
