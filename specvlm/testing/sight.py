"""Contract checks for the attention that a family records in its vision tower.

The checks do not know the tower. They change pixels of a clip and observe which rows of the record change: a frame's
rows may not depend on other frames, and the token whose features change most must have one of the most changed keys.

Shape suffixes: N video tokens, P tokens per frame, C size of a key, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from specvlm.models.video_lm import VideoLM
from specvlm.models.vision_probe import VisionProbe
from specvlm.testing.contract import seeded
from specvlm.types import TokenGrid, entering
from specvlm.video.video import Clip

CELLS = 16  # maximum number of tokens per frame that are tested by changing their pixels
FEW = 9  # in frames of fewer tokens, attention is too noisy to judge


class Seen(NamedTuple):
    """The grid of a clip, and what a tower gives for each token of its frames: features, received attention and key."""

    grid: TokenGrid
    features_ND: Tensor
    attention_N: Tensor
    keys_NC: Tensor


def check_sight(lm: VideoLM, clip: Clip, what: str) -> None:
    """Check the record that a family makes with a `VisionProbe`: its values, and that each row belongs to its token.

    clip: Random frames, of which groups of equal size make the frames of the grid.
    """
    whole = seen(lm, clip)
    _check_values(whole, what)
    _check_frames(lm, clip, whole, what)
    first = replace(clip, frames=clip.frames[:2], times=clip.times[:2], index=clip.index[:2])
    _check_tokens(lm, first, what)


def seen(lm: VideoLM, clip: Clip) -> Seen:
    """Encode a clip, and record the attention that its tokens receive."""
    grid, video = lm.process_video(clip)
    probe, cells = VisionProbe(), grid.cells
    features = entering(lm.encode_video(grid, video, None, probe))[:cells]
    return Seen(grid, features, probe.attention()[:cells], probe.keys()[:cells])


def _check_values(found: Seen, what: str) -> None:
    """Check that values are finite, attention is above 0 and at most 1 in sum per frame, and keys are not all equal."""
    attention_N, keys_NC = found.attention_N, found.keys_NC
    finite = bool(attention_N.isfinite().all() and keys_NC.isfinite().all())
    assert finite, f"{what}: the recorded attention or keys are not finite"
    none = int((attention_N <= 0).sum())
    assert not none, f"{what}: the recorded attention of {none} of {len(attention_N)} tokens is not above 0"
    total = float(attention_N.unflatten(0, (found.grid.frames, -1)).sum(1).max())
    assert total < 1.01, f"{what}: the recorded attention of a frame sums to {total:.3g}; it is a share, so at most to 1"
    assert float(keys_NC.std(0).max()) > 0, f"{what}: all tokens have the same recorded key"


def _check_frames(lm: VideoLM, clip: Clip, whole: Seen, what: str) -> None:
    """Check that a frame's rows depend only on that frame.

    Drops the pictures of the first frame of the grid and appends random ones. The rows of the other frames must be the
    same as before, one frame earlier.
    """
    count, rest = divmod(len(clip.frames), whole.grid.frames)
    if rest or whole.grid.frames < 3:
        return
    new = torch.randint(0, 255, clip.frames[:count].shape, dtype=torch.uint8, generator=seeded(9))
    moved = seen(lm, replace(clip, frames=torch.cat([clip.frames[count:], new])))
    if moved.grid != whole.grid:
        return
    step = whole.grid.per_frame
    pairs = (("attention", moved.attention_N, whole.attention_N), ("keys", moved.keys_NC, whole.keys_NC))
    for name, ours, before in pairs:
        same = torch.allclose(ours[:-step], before[step:], rtol=1e-3, atol=1e-5 * float(before.abs().max()))
        assert same, f"{what}: a frame's recorded {name} depend on other frames, or belong to another"


def _check_tokens(lm: VideoLM, clip: Clip, what: str) -> None:
    """Invert the pixels of one token after the other, and check that the record changes where the features do.

    The key of the token whose features change most must change more than half as much as any other. Attention is
    noisier than keys, since a changed token may receive as much as before. So its changes are summed over the tokens,
    and not judged in frames of fewer than FEW tokens.
    """
    base, own, mean = seen(lm, clip), 0.0, 0.0
    for changed in _inverted(clip.frames, base.grid):
        now = seen(lm, replace(clip, frames=changed))
        if now.grid != base.grid:
            return
        features_P, keys_P, attention_P = _moves(base, now)
        token, other = int(features_P.argmax()), int(keys_P.argmax())
        told = f"where the features of token {token} of a frame move most, the recorded key of token {other} does"
        assert keys_P[token] > keys_P[other] / 2, f"{what}: {told}: are the rows in the order of the features?"
        own, mean = own + float(attention_P[token]), mean + float(attention_P.mean())
    few = base.grid.per_frame < FEW
    told = f"{what}: the recorded attention does not move where the features do: are the rows in their order?"
    assert few or own > 1.5 * mean, told


def _moves(base: Seen, now: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Measure how much the features, key and attention of each token of the first frame changed; each (P,)."""
    size = base.grid.per_frame
    features_P, keys_P = (
        (ours - before)[:size].norm(dim=1)
        for ours, before in ((now.features_ND, base.features_ND), (now.keys_NC, base.keys_NC))
    )
    return features_P, keys_P, (now.attention_N - base.attention_N)[:size].abs()


def _inverted(frames: Tensor, grid: TokenGrid) -> Iterator[Tensor]:
    """Yield the frames with the pixels of one token inverted, for up to CELLS tokens of a frame."""
    height, width = frames.shape[2:]
    for cell in range(0, grid.per_frame, -(-grid.per_frame // CELLS)):
        y, x = divmod(cell, grid.width)
        rows = slice(y * height // grid.height, (y + 1) * height // grid.height)
        columns = slice(x * width // grid.width, (x + 1) * width // grid.width)
        changed = frames.clone()
        changed[:, :, rows, columns] = 255 - changed[:, :, rows, columns]
        yield changed
