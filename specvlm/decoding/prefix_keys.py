"""Identify a prompt's beginnings: a key for the prompt up to the end of each of its videos.

Shape suffixes: S prompt tokens, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from specvlm.types import VideoPrompt
from specvlm.types.pixels import pixel_digest


@dataclass(frozen=True, eq=False)
class PromptKeys:
    """Keys of a prompt's beginnings.

    A key stands for everything that the target's rows up to a slot depend on: the model and how passes run (`root`),
    the tokens, their rotary positions, and the pixels of videos and images.

    Attributes:
        prompt: The prompt.
        positions_AS: Rotary positions.
        root: Identifies the model that computes the rows, and how passes run.
    """

    prompt: VideoPrompt
    positions_AS: Tensor
    root: bytes

    @cached_property
    def videos(self) -> list[str]:
        """Digest of each video."""
        return [pixel_digest(video) for video in self.prompt.videos]

    @cached_property
    def joints(self) -> list[int]:
        """First slot after each video."""
        return self.prompt.joints

    @cached_property
    def keys(self) -> list[bytes]:
        """Key of the prompt up to each joint."""
        found, key, start = [], self.root, 0
        for joint, video in zip(self.joints, self.videos, strict=True):
            key = self._key(key, start, joint, [video])
            found.append(key)
            start = joint
        return found

    @property
    def base(self) -> bytes:
        """Key of the prompt up to the end of its last video; `root` if it has no video."""
        return self.keys[-1] if self.joints else self.root

    @cached_property
    def whole(self) -> bytes:
        """Key of the whole prompt."""
        return self._key(self.base, self.prompt.cut, len(self.prompt), ["whole"])

    @property
    def tail(self) -> Tensor:
        """Tokens after the last video."""
        return self.prompt.tokens[self.prompt.cut :]

    def _key(self, before: bytes, start: int, end: int, more: Sequence[str]) -> bytes:
        """Return the key of the prompt up to slot `end`. before: its key up to slot `start`. more: also hashed."""
        found = sha256(before)
        for tensor in (self.prompt.tokens[start:end], self.positions_AS[:, start:end]):
            found.update(tensor.cpu().to(torch.int64).contiguous().numpy().tobytes())
        at = 0
        for image, size in ((image, int(image["tokens"])) for image in self.prompt.images):
            if start <= int(self.prompt.image_index[at]) < end:
                found.update(pixel_digest(image).encode())
            at += size
        found.update(" ".join(more).encode())
        return found.digest()


def common(one: Tensor, other: Tensor) -> int:
    """Number of equal tokens at the beginning of two sequences."""
    size = min(len(one), len(other))
    return int((one[:size] == other[:size]).long().cumprod(0).sum())
