"""Digests of processed videos and images, and videos whose pixels are read only when needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from hashlib import sha256
from typing import Any
from weakref import ref

import torch
from torch import Tensor

PIECE = 2**23  # bytes that are hashed at once; several threads take a piece each
UNHASHED = frozenset({"origin", "digest"})  # keys that only say where pixels come from


def hash_of(item: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a processed video or image, except the keys in UNHASHED.

    It covers names, shapes, dtypes and bytes of tensors, and the repr of other values. Of a tensor, several threads
    hash a piece each, and the result covers the pieces' hashes.
    """
    found = sha256()
    for name in sorted(item.keys() - UNHASHED):
        value = item[name]
        if not isinstance(value, Tensor):
            found.update(f"{name} {value!r};".encode())
            continue
        found.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        pieces = [flat[at : at + PIECE] for at in range(0, len(flat), PIECE)]
        if len(pieces) < 2:
            parts = [sha256(piece).digest() for piece in pieces]
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                parts = list(pool.map(lambda piece: sha256(piece).digest(), pieces))
        found.update(b"".join(parts))
    return found.hexdigest()


class PixelDigest:
    """Caches the digest of a processed video or image, as long as its values are the same unchanged objects."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[Any, object]] = {}
        self._known = ""

    def __eq__(self, other: object) -> bool:
        """All instances are equal, since a digest adds nothing to what its item holds."""
        return isinstance(other, PixelDigest)

    def __hash__(self) -> int:
        return hash(PixelDigest)

    def of(self, item: Mapping[str, Any]) -> str:
        """Return the digest of the item that carries this object."""
        names = item.keys() - UNHASHED
        if self._marks.keys() != names or not all(self._same(name, item[name]) for name in names):
            self._known, self._marks = hash_of(item), {name: _mark(item[name]) for name in names}
        return self._known

    def _same(self, name: str, value: Any) -> bool:
        was, version = self._marks[name]
        if not isinstance(value, Tensor):
            return bool(was == repr(value))
        if value.is_inference() or not isinstance(was, ref):  # an inference tensor does not count its changes
            return False
        return was() is value and bool(version == getattr(value, "_version", None))


def _mark(value: Any) -> tuple[Any, object]:
    if isinstance(value, Tensor):
        return ref(value), None if value.is_inference() else value._version
    return repr(value), None


def pixel_digest(item: Mapping[str, Any]) -> str:
    """Return the digest of a processed video or image."""
    if isinstance(item, LateVideo):
        return item.digest
    digest = item.get("digest")
    return digest.of(item) if isinstance(digest, PixelDigest) else hash_of(item)


class LateVideo(dict[str, Any]):
    """A processed video whose tensors are made when first accessed, as in `video["pixels"]`.

    Args:
        known: The values that are not tensors.
        read: Makes the video with its tensors.
        digest: Digest of the video with its tensors.
        vision_rows: Number of patches in the largest pass of the vision tower, which otherwise is computed from the
            tensors.
    """

    def __init__(self, known: Mapping[str, Any], read: Callable[[], Mapping[str, Any]], digest: str, vision_rows: int) -> None:
        super().__init__(known)
        self._read, self.digest, self.vision_rows = read, digest, vision_rows

    @classmethod
    def of(cls, video: Mapping[str, Any], digest: str) -> LateVideo:
        """Wrap a video that has its tensors already."""
        return video if isinstance(video, LateVideo) else cls(video, dict, digest, 0)

    def __missing__(self, key: str) -> Any:
        return dict.__getitem__(self.whole(), key)  # a KeyError if there is none

    def whole(self) -> LateVideo:
        """Make the tensors, unless they exist already, and return the video."""
        if not any(isinstance(value, Tensor) for value in self.values()):
            self.update({name: value for name, value in self._read().items() if name not in self})
        return self

    def copy(self) -> LateVideo:
        """Copy the video. Its tensors are copied when first accessed."""
        known = {name: copy(value) for name, value in self.items() if not isinstance(value, Tensor)}
        return LateVideo(known, self._copied, self.digest, self.vision_rows)

    def _copied(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.whole().items() if isinstance(value, Tensor)}
