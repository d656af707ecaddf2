"""The benchmark of many requests, at a tiny shape on a CPU."""

from __future__ import annotations

import json

import pytest

from experiments.batch.__main__ import main
from experiments.batch.report import text


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
