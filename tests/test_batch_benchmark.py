"""The benchmark of many requests, at tiny shapes on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.batch.__main__ import main
from experiments.batch.cells import CELLS, TINY, chosen, missing
from experiments.batch.drafter import lucky
from experiments.batch.plot import SHAPE, TOKENS, best
from experiments.batch.report import text
from specvlm.errors import UserError
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.types import DraftTree, TreeShape
from specvlm.types.chances import expected


@pytest.mark.slow
def test_it_measures_and_reports(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = "--shape tiny --requests 1,2 --video-tokens 100 --rounds 3 --trees chain:3 --ratios 0.9 --chance 1 --commit x --out"
    assert main([*words.split(), str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["part"], row["requests"]) for row in rows] == [(p, n) for n in (1, 2) for p in ("alone", "speculative")]
    assert all(row["same_tokens"] and row["tokens_a_round"] == 4 for row in rows if row["part"] == "speculative")
    assert all(row["tokens_a_round"] == 1 and row["floor_ms"] > 0 for row in rows if row["part"] == "alone")
    assert text(rows).count("| chain:3 |") == 2


@pytest.mark.slow
def test_named_cells_are_measured_one_after_another_and_the_rest_is_named(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--cells", "tiny-*", "--rounds", "3", "--commit", "x", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["cell"] for row in rows} == set(TINY)
    for cell in TINY.values():
        mine = [row for row in rows if row["cell"] == cell.name]
        parts = ["hugging_face"] if cell.hugging_face else ["alone", *["speculative"] * len(cell.trees) * len(cell.ratios)]
        assert [row["part"] for row in mine] == parts
        assert all(row["requests"] == cell.requests and row["layers"] == cell.layers for row in mine)
        assert all(row["same_tokens"] for row in mine if row["part"] == "speculative")
    assert "not run: 16k-b1, " in capsys.readouterr().out
    assert main(["--list", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("not run") == len(CELLS)
    written = text(rows)
    assert "| auto (" in written and "0.5 of the layers" in written and "a request every 1 rounds" in written
    assert f"`{CELLS[0].name}`" in written.splitlines()[-1] and "| Hugging Face |" in written


def test_cells_have_names_of_their_own_trees_that_exist_and_stay_together_by_model():
    names = [cell.name for cell in (*CELLS, *TINY.values())]
    assert len(set(names)) == len(names) and {cell.requests for cell in CELLS} == {1, 2, 4, 8, 12, 16}
    for cell in CELLS:
        assert all(TreeDrafter(tree).shapes for tree in cell.trees) and cell.pair.draft is not None
    half, whole = chosen("16k-b16-half")[0].pair, chosen("16k-b12")[0].pair
    assert (half.target.text.layers, half.draft.text.layers) == (32, 14) and whole.target.text.layers == 64
    order = [cell.models for cell in chosen("16k-b8-fp8,16k-b4,16k-b1-fp8,4k-b1")]
    assert order == sorted(order, key=order.index) and [cell.name for cell in chosen("16k-b4,16k-b1-fp8,4k-b1")] == [
        "16k-b4",
        "4k-b1",
        "16k-b1-fp8",
    ]
    with pytest.raises(UserError, match="16k-b9"):
        chosen("16k-b9")
    assert missing(names) == []


@pytest.mark.parametrize("shape", ["chain:4", "paper", "3x2x1"])
def test_guesses_are_right_as_often_as_they_are_expected_to_be(shape):
    generator, made = torch.Generator().manual_seed(0), TreeShape.parse(shape)
    tree = DraftTree(torch.zeros(len(made)), made.parents, ranks=made.ranks)
    depths = [tree.depths[lucky(tree, 0.7, torch.rand(6, generator=generator).tolist())] for _ in range(4000)]
    assert sum(depths) / len(depths) == pytest.approx(expected(made, [0.7] * made.depth), rel=0.05)


def test_the_picture_has_the_best_tree_of_rows_of_its_setting():
    row = {"part": "speculative", "shape": SHAPE, "video_tokens": TOKENS, "ratio": 0.9, "draft_weights": "bf16", "requests": 8}
    rows = [
        row | {"against_alone": 1.8},  # of a run before cells had names
        row | {"against_alone": 1.9, "chance": 0.8, "layers": 1.0},
        row | {"against_alone": 3.0, "chance": 0.6},
        row | {"against_alone": 2.1, "layers": 0.5, "requests": 16},
        {"part": "alone", **{key: row[key] for key in ("shape", "video_tokens", "draft_weights")}},
    ]
    assert best(rows, 0.9, "bf16") == {8: 1.9} and best(rows, 0.9, "bf16", 0.5) == {16: 2.1} and best(rows, 0.0, "bf16") == {}
