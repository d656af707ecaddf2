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
    wanted = ("question", "parts", "answers", "answers", "stall", "stall")
    assert [(row["pruner"], row["part"]) for row in rows] == [
        (one, part) for one in ("two_stage", "uniform") for part in wanted
    ]
    assert all(row["same_tokens"] for row in rows if row["part"] in ("question", "answers"))
    for row in (row for row in rows if row["part"] == "question"):
        stages = sum(row[f"second_question_first_round_{stage}_ms"] for stage in ("prune", "draft_prefill", "draft", "verify"))
        assert 0 < stages <= row["second_question_first_round_ms"] - row["second_question_first_token_ms"]
    for row in (row for row in rows if row["part"] == "parts"):
        first, then = row["first_token"], row["first_round"]
        # Hugging Face's modules run the question in one pass, and nothing of the video.
        assert first["module_passes"]["calls"] == 1 and "draft_tower" not in then and first["copy_rows"]["calls"] == 1
        assert first.get("collect", {"calls": 0})["calls"] == (3 if row["pruner"] == "two_stage" else 0)
        assert then["prune"]["calls"] == then["draft_fill"]["calls"] == 1
    held, free = (max(row["steps_during"] for row in rows if row.get("stall_s") == stall) for stall in (0, 1000))
    assert held > free


@pytest.mark.slow
def test_nothing_begins_once_time_is_up(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--shape", "tiny", "--video-tokens", "60", "--seconds", "0", "--commit", "x", "--out", str(out)]) == 0
    assert not out.exists() and capsys.readouterr().out.count("time is up") == 2 * (1 + 1 + 2 + 3)


@pytest.mark.parametrize("parts", ["", "question,nothing"])
def test_a_part_that_there_is_not(parts, tmp_path):
    with pytest.raises(SystemExit):
        main(["--shape", "tiny", "--parts", parts, "--out", str(tmp_path / "rows.jsonl")])
