"""Put the slots of videos and images into a chat prompt, in two steps.

A chat template writes a *mark*, a short text, for each video and image. `Spelling` replaces it by the family's own
text, which contains one or more *slot tokens*. `expanded` then repeats each slot token, so that the prompt has one slot
per feature. The slots made from one slot token are a *run*.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specvlm.errors import UserError
from specvlm.types import TokenGrid, VideoPrompt


@dataclass(frozen=True)
class Spelling:
    """Replaces the marks of videos and images in a rendered chat by the family's own texts, in order.

    Attributes:
        marks: The marks of a video and of an image.
        videos: Text of each video.
        images: Text of each image.
    """

    marks: tuple[str, str]
    videos: Sequence[str] = ()
    images: Sequence[str] = ()

    def __call__(self, text: str) -> str:
        """Replace the marks in a text, in order. Marks beyond the number of texts stay; an empty mark is skipped."""
        pairs = zip(self.marks, (self.videos, self.images), strict=True)
        left = {mark: iter(texts) for mark, texts in pairs if mark and texts}
        pattern = "|".join(map(re.escape, left))
        return re.sub(pattern, lambda found: next(left[found[0]], found[0]), text) if left else text


def expanded(
    ids: Sequence[int],
    slots: tuple[int, int],
    vocabulary: int,
    grids: Sequence[TokenGrid],
    runs: Mapping[str, Sequence[Sequence[int]]],
    videos: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]],
    order: Sequence[str] = (),
) -> VideoPrompt:
    """Implement `VideoLM.expand`.

    slots: Ids of the slot tokens of videos and of images.
    runs: Lengths of the runs of each video, under "video", and of each image, under "image".
    """
    wanted = _wanted(slots, runs, order or ["image"] * len(images) + ["video"] * len(grids))
    for token, there in wanted.items():
        if (found := list(ids).count(token)) != len(there):
            what = "videos" if token == slots[0] else "images"
            raise UserError(
                f"{found} placeholders for {len(there)} {what} in the prompt: the chat template places them otherwise, or "
                "config.json gives them another token"
            )
    if (largest := max(ids, default=0)) >= vocabulary:
        raise UserError(f"the tokenizer gives token id {largest}, but the model has {vocabulary}: they do not match")
    parts = list(_parts(ids, {token: iter(there) for token, there in wanted.items()}))
    tokens_S = torch.tensor([token for token, _, length in parts for _ in range(length)])
    kind_S = [kind for _, kind, length in parts for _ in range(length)]
    video_N, image_I = (
        torch.tensor([at for at, its in enumerate(kind_S) if its == kind]).long() for kind in ("video", "image")
    )
    prompt = VideoPrompt(tokens_S, video_N, tuple(grids), tuple(videos), tuple(images), image_I)
    if prompt.cut == len(prompt):
        raise UserError(
            "no text follows the video: put the question after it, since its attention is what scores the video tokens"
        )
    return prompt


def _wanted(
    slots: tuple[int, int], sizes: Mapping[str, Sequence[Sequence[int]]], order: Sequence[str]
) -> dict[int, list[tuple[str, int]]]:
    """Map each slot token's id to its runs in order, as pairs ("video" or "image", number of slots)."""
    left, found = {kind: iter(runs) for kind, runs in sizes.items()}, {slot: list[tuple[str, int]]() for slot in slots}
    for kind in order:
        found[slots[0] if kind == "video" else slots[1]] += [(kind, length) for length in next(left[kind])]
    return found


def _parts(ids: Sequence[int], left: dict[int, Iterator[tuple[str, int]]]) -> Iterator[tuple[int, str, int]]:
    """Yield (token id, kind, number of slots) for each id; text has kind "text" and one slot. left: from `_wanted`."""
    for token in ids:
        yield (token, *(next(left[token]) if token in left else ("text", 1)))
