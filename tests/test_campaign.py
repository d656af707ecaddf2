"""A sample of every campaign, so that no rename breaks one unnoticed."""

from __future__ import annotations

import html
import json
import os
import random
import re
import subprocess
import sys

import pytest
from campaign import crossings, hostile, judged, sweeps, xss
from campaign.__main__ import campaigns, main
from campaign.fork import Ended
from campaign.hostile_plugin import FOUND

from specvlm.engine.repetition import RepetitionPenalty
from specvlm.strategies.registry import collect


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--few", pytest.param("--sample", marks=pytest.mark.exhaustive)])
def test_a_sample_of_every_campaign_finds_nothing(how):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # another process: campaigns fork, and this one has threads
    done = subprocess.run([sys.executable, "-m", "campaign", how], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ends = [line.partition(":")[0] for line in done.stdout.splitlines() if " attacks, 0 findings" in line]
    assert ends == list(campaigns()) and {"bad_keys", "disk", "kills", "leaks", "xss"} <= set(ends)


@pytest.mark.parametrize("name", campaigns())
def test_a_campaign_says_how_much_of_it_is_run(name):
    campaign = campaigns()[name]
    assert 0 < campaign.SAMPLE < campaign.COUNT and campaign.__doc__


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(3, "", "specvlm: a fault", 1.0, 1), "exit code 3"),
        (Ended(-11, "", "", 1.0, 1), "exit code -11"),
        (Ended(None, "", "", 1.0, 1), "hung"),
        (Ended(0, "", "", 30.0, 1), "hung"),
        (Ended(0, "", "Traceback (most recent call last):", 1.0, 1), "traceback"),
        (Ended(2, "", "one line\nand another", 1.0, 1), "2 lines"),
        (Ended(2, "", "", 1.0, 1), "0 lines"),
    ],
)
def test_an_end_that_is_wrong_is_found(ended, fault):
    assert ended.faults()[0].startswith(fault)
    assert not Ended(2, "", "specvlm: one line\n", 1.0, 1).faults() and not Ended(0, "an answer", "", 1.0, 1).faults()


def sweep_of(folder, rows, steps):
    job = folder / "job"
    job.mkdir(parents=True)
    for name, lines in (("samples", rows), ("steps", steps)):
        (job / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rows_that_are_lost_doubled_or_changed_are_found(tmp_path):
    rows = [{"sample": name, "status": "ok", "token_ids": [1, 2], "decode_s": 1.0} for name in "ab"]
    steps = [{"sample": name, "tokens": [token]} for name in "ab" for token in (1, 2)]
    whole = sweeps.rows(sweep_of(tmp_path / "whole", rows, steps))
    later = [row | {"decode_s": 2.0} for row in rows]
    assert not sweeps.differences(sweep_of(tmp_path / "later", later, steps), whole)
    for number, (wrong, rounds, said) in enumerate(
        [
            (rows[:1], steps[:2], "('job', 'b') is missing"),
            ([*rows, rows[0]], [*steps, *steps[:2]], "job: a was written twice"),
            ([rows[0], rows[1] | {"answer": "no"}], steps, "('job', 'b') differs in answer"),
            (rows, steps[:3], "job: the rounds of b do not give its tokens"),
        ]
    ):
        assert said in sweeps.differences(sweep_of(tmp_path / f"{number}", wrong, rounds), whole)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<script>1</script>", "<script>"),
        ("<img src=x onerror=a()>", "onerror=…"),
        ("<a href='javascript:a()'>x</a>", "href=javascript:a()"),
        ("<base href=//evil>", "<base>"),
        ("<iframe srcdoc='x'>", "srcdoc=…"),
    ],
)
def test_what_can_act_in_a_page_is_counted(text, part, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<p>{text}</p>")
    assert xss.active_parts(page)[part] == 1
    page.write_text(f"<p>{html.escape(text)}</p>")
    assert not xss.active_parts(page)


RIGHT = {"token_ids": [1, 2], "text": "a b", "baseline_token_ids": [1, 2], "verdict": "identical", "status": "ok"}
MISMATCH = {"token_ids": [1, 3], "verdict": "MISMATCH at token 1: why"}


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"token_ids": [1, 3]}, 0, "a wrong output is called identical"),
        ({"token_ids": [1, 3], "verdict": "numeric tie at token 1 (gap 0)"}, 0, "a wrong output is called numeric tie"),
        ({"text": "c"}, 0, "a wrong text is called identical"),
        ({"baseline_token_ids": [4, 4], "verdict": "lossy"}, 0, "the baseline is not the target's own"),
        (MISMATCH, 0, "exit code is not 1 for a MISMATCH"),
    ],
)
def test_an_answer_that_a_hostile_strategy_spoiled_is_found(change, code, said):
    assert [fault[: len(said)] for fault in judged.answer_faults(RIGHT | change, RIGHT, code)] == [said]
    assert not judged.answer_faults(RIGHT, RIGHT, 0) and not judged.answer_faults(RIGHT | MISMATCH, RIGHT, 1)


def test_an_innocent_row_that_is_not_as_it_was_is_found():
    assert not judged.difference(RIGHT | {"decode_s": 2.0, "baseline": "another"}, RIGHT | {"decode_s": 1.0, "baseline": "one"})
    assert judged.difference(RIGHT | {"verdict": "lossy"}, RIGHT) == "verdict is lossy, not identical"
    assert judged.difference(RIGHT | {"kept": [1]}, RIGHT) == "kept is [1], not None"
    assert judged.difference(RIGHT | {"baseline_end_to_end_s": 1e6}, RIGHT) == "a time that nobody took"


def test_hostile_strategies_are_of_many_mechanisms_and_each_has_its_turn():
    assert len({(cls.kind, cls.name) for cls in FOUND}) == len(FOUND) >= 60
    mechanisms = {cls.mechanism for cls in FOUND} | {"imports"}
    assert len(mechanisms) >= 12
    called = [what for what, _ in hostile._attacks(random.Random(0), 60)]
    singly = [what.partition(":")[0] for number, what in enumerate(called) if number % 10 != 9]
    assert set(singly) == mechanisms and 5 < sum(what.endswith("alone") for what in called) < 30


def test_every_choice_is_drawn_among_the_crossings_and_the_same_for_the_same_numbers():
    cases = [crossings.drawn(0, number) for number in range(crossings.COUNT)]
    assert {case.pruner for case in cases} == set(crossings.pruners())
    assert {case.drafter.name for case in cases} >= set(collect()["drafter"])
    assert {case.draft for case in cases} == set(crossings.OF_A_DRAFT)
    for name, most in (("family", 2), ("positions", 2), ("mrope", 2), ("engine", 2), ("weights", 3), ("penalty", 4)):
        assert len({getattr(case, name) for case in cases}) == most, name
    assert {case.layout.count("v") for case in cases} == {1, 2, 3} == {case.layout.count("i") for case in cases} - {0}
    assert {len(case.stops) + len(case.ids) for case in cases} >= {0, 1, 3}
    assert crossings.drawn(0, 17) == cases[17] != crossings.drawn(1, 17)


@pytest.mark.slow
def test_a_crossing_that_differs_is_found_with_what_regenerates_it(monkeypatch):
    assert not crossings.run(12, 0)
    monkeypatch.setattr(RepetitionPenalty, "__call__", lambda self, logits_MV, *tree: logits_MV)
    found = crossings.run(12, 0)
    assert found
    seed, case = map(int, re.match(r"seed (\d+), case (\d+), family ", found[0]).groups())
    fault = crossings.fault_of(crossings.drawn(seed, case))
    assert fault.startswith("from token ") and found[0].endswith(f": {fault}")


@pytest.fixture
def finding(monkeypatch):
    """Make the campaign of bad keys report a finding."""
    monkeypatch.setattr(campaigns()["bad_keys"], "run", lambda count, seed: [f"a fault among {count}"])


def test_a_finding_is_printed_and_ends_the_runner_with_1(finding, capsys):
    assert main(["bad_keys", "--count", "7"]) == 1
    assert capsys.readouterr().out.startswith("bad_keys: FOUND a fault among 7\nbad_keys: 7 attacks, 1 findings, 0 s, seed 0")


def test_a_campaign_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        main(["no_such"])
    assert "no campaign 'no_such'; there are bad_checkpoints, bad_inputs, bad_keys" in capsys.readouterr().err
