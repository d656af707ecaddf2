"""The benchmark of what is kept of prompts, at a tiny shape on a CPU."""

from __future__ import annotations

import json

import pytest

from experiments.prefix.__main__ import main


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny_llava"])
def test_it_measures_every_part(shape, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = f"--shape {shape} --video-tokens 60 --answers 4,6 --stalls 0,1000 --repeats 1 --rounds 3 --tree chain:3 --commit x"
    assert main([*words.split(), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["pruner"], row["part"]) for row in rows] == [
        (pruner, part) for pruner in ("two_stage", "uniform") for part in ("question", "answers", "answers", "stall", "stall")
    ]
    assert all(row["same_tokens"] for row in rows if row["part"] != "stall")
    assert all(row["second_question_first_token_ms"] > 0 for row in rows if row["part"] == "question")
    held, free = (max(row["steps_during"] for row in rows if row.get("stall_s") == stall) for stall in (0, 1000))
    assert held > free
