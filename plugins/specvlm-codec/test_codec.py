"""The contract, and clips of one moving square: moving cells are kept; a file without motion falls back with a note."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from specvlm_codec import CodecPruner, ranks_of, shares

from specvlm.decoding.collect import codec
from specvlm.strategies import PruneContext
from specvlm.testing import check_pruner
from specvlm.types import KeepSet, TokenGrid, VideoPrompt
from specvlm.video.codec import Origin

av = pytest.importorskip("av", reason="PyAV makes the test clips")
SIDE, SQUARE, FRAMES = 256, 64, 24
GRID = TokenGrid(FRAMES // 4, 8, 8, newline=1)
INDEX = tuple(range(3, FRAMES, 4))


def place(number):
    """Left edge of the square in a frame; it moves along the middle."""
    return 8 + 6 * number


def draw(path, options, encoder="libx264"):
    texture = np.random.default_rng(0).integers(0, 255, (SIDE // 8 + SQUARE // 8, SIDE // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=25)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", options
        for number in range(FRAMES):
            picture = texture[:SIDE].copy()
            picture[96 : 96 + SQUARE, place(number) : place(number) + SQUARE] = texture[SIDE:, :SQUARE]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


INTER = {"preset": "medium", "bf": "0", "g": "250", "x264-params": "scenecut=0"}


def context(origin, budget):
    request = VideoPrompt(
        torch.zeros(len(GRID) + 1, dtype=torch.int64), torch.arange(len(GRID)), (GRID,), ({"origin": origin},)
    )
    signals = dict(zip(("motion", "packet_bytes", "intra"), codec(request), strict=True))
    return PruneContext((GRID,), budget, signals)


@pytest.mark.parametrize("share", ["bytes", "motion", "even"])
def test_contract(share):
    check_pruner(CodecPruner, share=share)


@pytest.mark.parametrize("share", ["bytes", "motion", "even"])
@pytest.mark.parametrize("options", [INTER, INTER | {"bf": "3"}], ids=["P", "B"])
def test_the_moving_cells_win_over_a_still_background(tmp_path, options, share):
    ctx = context(Origin(str(draw(tmp_path / "moving.mp4", options)), INDEX), 40)
    keep = CodecPruner(share).select(ctx).index
    assert len(keep) == 40
    for index in keep[(keep >= GRID.per_frame) & (keep < GRID.cells)].tolist():  # frame 0 has the key frame's bytes
        frame, row, column = index // 64, index // 8 % 8, index % 8
        first, last = place(4 * frame - 1), place(4 * frame + 3) + SQUARE
        assert row in (3, 4) and first // 32 <= column <= last // 32, (frame, row, column)


def test_a_camera_that_moves_by_itself_is_no_motion(tmp_path):
    path = tmp_path / "pan.mp4"
    texture = np.random.default_rng(0).integers(0, 255, (SIDE // 8, SIDE // 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", INTER
        for number in range(FRAMES):
            picture = np.ascontiguousarray(texture[:, 6 * number : 6 * number + SIDE])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    motion = context(Origin(str(path), INDEX), 9).signals["motion"][: GRID.cells].unflatten(0, (-1, 8, 8))
    assert motion[:, 1:-1, 1:-2].median() < 0.5  # the square of the other test moves 6 pixels per frame, 24 per sample


def fallback(origin):
    keep = CodecPruner().select(context(origin, 40))
    assert torch.equal(keep.index, KeepSet.uniform(len(GRID), 40).index)
    return keep.note


def test_an_all_intra_file_falls_back_with_its_line(tmp_path):
    path = draw(tmp_path / "intra.mp4", {"preset": "ultrafast", "g": "1"})
    assert "every frame of the file is coded by itself" in fallback(Origin(str(path), INDEX))


def test_a_missing_or_damaged_file_falls_back_with_its_line(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    for origin in (None, Origin(str(tmp_path / "none.mp4"), INDEX), Origin(str(tmp_path / "noise.mp4"), INDEX)):
        assert "no file that PyAV can read" in fallback(origin)


def test_a_still_video_falls_back_with_its_line():
    signals = {"motion": torch.zeros(16), "packet_bytes": torch.ones(16), "intra": torch.zeros(16)}
    keep = CodecPruner().select(PruneContext((TokenGrid(4, 2, 2),), 5, signals))
    assert keep.index.tolist() == KeepSet.uniform(16, 5).index.tolist() and "nothing moves" in keep.note


def test_of_two_videos_the_one_without_motion_is_kept_evenly():
    motion = torch.zeros(20)
    motion[[1, 6]] = 1.0
    signals = {"motion": motion, "packet_bytes": torch.ones(20), "intra": torch.zeros(20)}
    keep = CodecPruner().select(PruneContext((TokenGrid(2, 2, 2), TokenGrid(3, 2, 2)), 5, signals))
    assert keep.index.tolist()[:2] == [1, 6] and [int(((keep.index - 8) // 4 == f).sum()) for f in range(3)] == [1, 1, 1]
    assert keep.note.startswith("codec: no motion in video 2 (nothing moves")


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_and_follow_the_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(9, generator=generator) ** 4 * (torch.rand(9, generator=generator) > 0.3)
    for room in range(0, 9 * 5 + 1):
        found = shares(weights, room, torch.full((9,), 5))
        assert int(found.sum()) == room and int(found.max()) <= 5
        free = found < 5
        if found[free].sum() and weights[free].sum():
            wanted = weights[free] * found[free].sum() / weights[free].sum()
            assert (found[free] - wanted).abs().max() <= 1


def test_a_frame_that_stands_alone_may_take_all_its_cells_and_a_still_one_none():
    motion = torch.zeros(3, 4)
    motion[1, 2] = motion[2, 3] = 1.0
    signals = {"motion": motion.flatten(), "packet_bytes": torch.tensor([90.0, 5, 5]).repeat_interleave(4)}
    for intra, kept in (([1.0, 0, 0], [0, 1, 2, 3, 6, 11]), ([0.0, 0, 0], [6, 11])):
        ctx = PruneContext((TokenGrid(3, 2, 2),), len(kept), signals | {"intra": torch.tensor(intra).repeat_interleave(4)})
        assert CodecPruner().select(ctx).index.tolist() == kept


@pytest.mark.parametrize(("share", "counts"), [("bytes", [6, 2, 1]), ("motion", [1, 2, 6]), ("even", [3, 3, 3])])
def test_frames_share_the_budget_by_what_share_names(share, counts):
    moved = torch.tensor([1.0, 2.0, 6.0])
    signals = {"motion": moved.repeat_interleave(8), "packet_bytes": torch.tensor([6.0, 2.0, 1.0]).repeat_interleave(8)}
    ctx = PruneContext((TokenGrid(3, 2, 4),), 9, signals | {"intra": torch.zeros(24)})
    assert torch.bincount(CodecPruner(share).select(ctx).index // 8, minlength=3).tolist() == counts


@pytest.mark.parametrize("budget", range(1, 13))
def test_still_cells_get_what_moving_ones_leave(budget):
    motion = torch.zeros(12)
    motion[[5, 10]] = 1.0
    ctx = PruneContext(
        (TokenGrid(3, 2, 2),), budget, {"motion": motion, "packet_bytes": torch.ones(12), "intra": torch.zeros(12)}
    )
    keep = CodecPruner().select(ctx).index.tolist()
    assert len(keep) == budget and ({5, 10} <= set(keep) or budget < 2)


def test_equal_cells_are_spread_over_the_frame():
    ranks = ranks_of(torch.zeros(2, 64))
    first = (ranks[0] < 8).nonzero().flatten()
    assert first.diff().max() <= 16 and torch.equal(ranks.sort(1).values, torch.arange(64).expand(2, -1))


def given(weights, room, most):
    """Split `room` in proportion to integer weights, with an upper bound each; in fractions."""
    out = [0] * len(weights)
    free = [f for f in range(len(weights)) if most[f]]
    while room and free:
        total = sum(weights[f] for f in free)
        quota = {f: Fraction(room * weights[f], total) if total else Fraction(room, len(free)) for f in free}
        full = [f for f in free if quota[f] >= most[f]]
        if not full:
            for f in free:
                out[f] = math.floor(quota[f])
            ranked = sorted(free, key=lambda f: (out[f] - quota[f], f))
            for f in ranked[: room - sum(out[f] for f in free)]:
                out[f] += 1
            break
        for f in full:
            out[f] = most[f]
        room, free = room - sum(most[f] for f in full), [f for f in free if f not in full]
    return out


def naive(motion, size, intra, budget, share):
    """Number of cells kept of each frame, and their saliency."""
    per_frame = len(motion[0])
    weights = {"bytes": size, "motion": [sum(row) for row in motion], "even": [1] * len(motion)}[share]
    new = [per_frame if i else sum(m > 0 for m in row) for i, row in zip(intra, motion, strict=True)]
    first = given(weights, budget, new)
    second = given(weights, budget - sum(first), [per_frame - n for n in first])
    return [sorted(row, reverse=True)[: a + b] for row, a, b in zip(motion, first, second, strict=True)]


@pytest.mark.parametrize("share", ["bytes", "motion", "even"])
@pytest.mark.parametrize("kind", ["random", "ties", "still frames", "alternating", "one frame"])
def test_frames_and_cells_equal_a_brute_force(kind, share):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        grid = TokenGrid(1 if kind == "one frame" else 5 + seed % 2, 2, 4)
        motion_FP = torch.randint(2 if kind == "ties" else 5, (grid.frames, 8), generator=generator)
        motion_FP[::2] *= kind != "still frames"
        if kind == "alternating":
            motion_FP = motion_FP[torch.arange(grid.frames) % 2]
        motion_FP[-1, 0] = 1  # something moves
        size_F = torch.randint(1, 9, (grid.frames,), generator=generator)
        intra_F = torch.randint(2, (grid.frames,), generator=generator) * (torch.arange(grid.frames) < 1) * (grid.frames > 1)
        signals = {"motion": motion_FP.flatten().float(), "packet_bytes": size_F.repeat_interleave(8).float()}
        signals["intra"] = intra_F.repeat_interleave(8).float()
        for budget in (1, 3, len(grid) // 2, len(grid) - 1):
            index = CodecPruner(share).select(PruneContext((grid,), budget, signals)).index
            shown = [
                motion_FP.flatten()[index[index // 8 == f]].sort(descending=True).values.tolist() for f in range(grid.frames)
            ]
            assert shown == naive(motion_FP.tolist(), size_F.tolist(), intra_F.tolist(), budget, share)
