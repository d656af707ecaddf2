"""A film shows what the drafter saw: as long as there are frames, kept tokens bright, dropped ones dim."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image
from report_jobs import job, row

from specvlm.errors import UserError
from specvlm.report.film import GIF, MARGIN, PANEL, film
from specvlm.report.reading import read_jobs
from specvlm.report.seen import Round, Seen, View
from specvlm.types import TokenGrid

GRID = TokenGrid(4, 2, 2, newline=1)
KEPT = [0, 1, 7, 16]  # the upper half of frame 0, the last cell of frame 1, the newline


@pytest.fixture
def seen(tmp_path) -> Seen:
    (only,) = read_jobs([job(tmp_path / "job", [row(0)])])
    heat = np.ones(len(GRID), dtype=np.float32)
    rounds = [Round([], [], "a"), Round([" red"] * 40, [" blue"], " star")]
    view = View(only, only.rows[0], KEPT, heat, rounds)
    white = [Image.new("RGB", (64, 64), (250, 250, 250)) for _ in range(4)]
    return Seen("scene-0000", grid=GRID, frames=white, shown=[0, 1, 2, 3], seconds=[0, 1, 2, 3], views=[view])


def pictures(path) -> list[np.ndarray]:
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Image.open(path) as image:
        found = []
        for number in range(image.n_frames):
            image.seek(number)
            found.append(np.asarray(image.convert("RGB")))
        return found


@pytest.mark.parametrize("name", ["saw.mp4", "saw.gif"])
def test_kept_tokens_are_bright_and_dropped_ones_dim(seen, tmp_path, name):
    film(seen, tmp_path / "films" / name)
    shown, scale = pictures(tmp_path / "films" / name), GIF if name.endswith("gif") else 1
    assert len(shown) == 4

    def bright(frame: int, row: int, column: int) -> bool:
        y, x = (round(scale * (MARGIN + (2 * place + 1) * PANEL // 4)) for place in (row, column))
        return shown[frame][y, x].mean() > 150

    found = [(f * 4 + 2 * r + c) for f in range(4) for r in range(2) for c in range(2) if bright(f, r, c)]
    assert found == [token for token in KEPT if token < GRID.cells]
    words = [picture[round(scale * (MARGIN + PANEL + 30)) :].max(-1) > 100 for picture in shown]
    assert words[0].sum() < words[3].sum()  # the answer grows


def test_what_cannot_be_filmed_is_said_in_one_line(seen, tmp_path):
    with pytest.raises(UserError, match="ends in .mp4 or .gif"):
        film(seen, tmp_path / "saw.avi")
    with pytest.raises(UserError, match="cannot show b: gone"):
        film(Seen("b", problem="gone"), tmp_path / "saw.mp4")
