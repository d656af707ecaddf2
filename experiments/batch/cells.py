"""Cells of the benchmark: what is measured, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from experiments.gpu_pair.shapes import Pair, pair_of
from specvlm.errors import UserError, did_you_mean

K = 1024


@dataclass(frozen=True)
class Cell:
    """One number of requests of one pair.

    Attributes:
        name: For the command line, and in the rows.
        shape: Pair of `experiments.gpu_pair`.
        requests: Number of requests.
        video_tokens: Sizes of the videos; requests take them in turn.
        chance: Chance that a best guess is right.
        trees: Shapes to draft.
        ratios: Shares of the video tokens that the draft does not see.
        draft_weights: How the draft's weights are stored.
        layers: Share of the layers of both models that are kept.
        stagger: Rounds between two arrivals.
        hugging_face: Measure Hugging Face's `generate` on the batch instead.
    """

    name: str
    shape: str
    requests: int
    video_tokens: tuple[int, ...] = (16 * K,)
    chance: float = 0.8
    trees: tuple[str, ...] = ("chain:4", "auto")
    ratios: tuple[float, ...] = (0.9, 0.0)
    draft_weights: str = "bf16"
    layers: float = 1.0
    stagger: int = 0
    hugging_face: bool = False

    @property
    def models(self) -> tuple[str, float, str | None]:
        """What cells share that can use the same models. Hugging Face's needs no draft."""
        return self.shape, self.layers, None if self.hugging_face else self.draft_weights

    @property
    def pair(self) -> Pair:
        """The pair, with as many layers as are kept."""
        whole = pair_of(self.shape)
        assert whole.draft is not None

        def kept(shape):  # type: ignore[no-untyped-def]
            return replace(shape, text=replace(shape.text, layers=max(1, round(shape.text.layers * self.layers))))

        return whole if self.layers == 1 else replace(whole, target=kept(whole.target), draft=kept(whole.draft))


QWEN, QWEN3 = "qwen2_5_vl_32b_7b", "qwen3_vl_32b_4b"
MIXED = (1 * K, 4 * K, 8 * K, 16 * K)
WIDER = ("chain:2", "chain:4", "chain:6", "paper", "auto")

CELLS = (
    # One H200 has 139 GiB. At 16,384 tokens a request's caches take 4.3 GB of the target, and 0.94 or 0.1 of the draft.
    *(Cell(f"16k-b{n}", QWEN, n, trees=WIDER if n in (1, 8) else ("chain:4", "auto")) for n in (1, 2, 4, 8)),
    Cell("16k-b12", QWEN, 12, ratios=(0.9,)),
    Cell("16k-b16-half", QWEN, 16, layers=0.5),
    Cell("16k-b8-half", QWEN, 8, layers=0.5),  # tells what half the layers change
    *(Cell(f"16k-b{n}-fp8", QWEN, n, draft_weights="fp8") for n in (1, 4, 8)),
    *(Cell(f"16k-b{n}-p06", QWEN, n, chance=0.6, trees=("chain:2", "chain:4", "auto")) for n in (1, 4, 8)),
    *(Cell(f"4k-b{n}", QWEN, n, (4 * K,)) for n in (1, 4, 8, 16)),
    *(Cell(f"64k-b{n}", QWEN, n, (64 * K,)) for n in (1, 2)),
    Cell("mixed-b8", QWEN, 8, MIXED, stagger=3),
    *(Cell(f"qwen3-16k-b{n}", QWEN3, n) for n in (1, 4, 8)),
    *(Cell(f"hf-16k-b{n}", QWEN, n, hugging_face=True) for n in (1, 4, 8)),
)
TINY = {  # for tests
    cell.name: cell
    for cell in (
        Cell("tiny-b2", "tiny", 2, (100,), 1.0, ("chain:3", "auto"), (0.9,)),
        Cell("tiny-mixed-b3", "tiny", 3, (40, 100), 0.8, ("auto",), (0.9,), stagger=1),
        Cell("tiny-half-b2", "tiny_qwen3", 2, (100,), 0.6, ("paper",), (0.0,), layers=0.5),
        Cell("tiny-hf-b2", "tiny", 2, (100,), hugging_face=True),
    )
}


def chosen(words: str) -> list[Cell]:
    """Return the cells of names and patterns, with commas, those of the same models together. Raises UserError."""
    found: dict[str, Cell] = {}
    for word in words.split(","):
        match = [cell for cell in (*CELLS, *TINY.values()) if fnmatchcase(cell.name, word)]
        if not match:
            names = [cell.name for cell in CELLS]
            raise UserError(f"--cells {word}: there is {', '.join(names)}.{did_you_mean(word, names)}")
        found |= {cell.name: cell for cell in match}
    order = list(dict.fromkeys(str(cell.models) for cell in found.values()))
    return sorted(found.values(), key=lambda cell: order.index(str(cell.models)))


def missing(names: Sequence[str]) -> list[str]:
    """Name the cells that are not among these."""
    return [cell.name for cell in CELLS if cell.name not in names]
