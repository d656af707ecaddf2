"""The benchmark of a hidden draft, at a tiny shape on a CPU, and its recorded and predicted outcomes."""

from __future__ import annotations

import json
import sys

import pytest
import tiny

from experiments.overlap import start
from experiments.overlap.__main__ import main
from experiments.overlap.drafter import Given, GivenOverlapDrafter, GivenTreeDrafter, replayed, spread
from experiments.overlap.report import hits, read, times
from specvlm.advise.acceptance import Chances, Replay
from specvlm.advise.advice import Candidate
from specvlm.advise.overlap import Overlapped, outcomes, overlapped
from specvlm.decoding import early_start
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.results.metrics import tokens_of
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, TreeShape

OUTCOMES = ((3, True), (0, False), (2, True), (3, False), (1, True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "drafter", [GivenTreeDrafter("chain:3"), GivenOverlapDrafter("3x1x1", ahead=9)], ids=["tree", "overlap"]
)
def test_given_outcomes_come_true(drafter):
    target, draft, prompt = tiny.model("qwen2_5_vl"), tiny.draft_of("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    known = tuple(tokens_of(list(autoregressive(target, prompt, 40, GreedyVerifier()))))
    object.__setattr__(drafter, "given", Given(known, OUTCOMES))
    options = GenerationOptions(ratio=0.5)
    steps = list(DecodingGraph(target, draft, UniformPruner(), drafter, GreedyVerifier(), options).decode(prompt, 28))
    assert tokens_of(steps) == list(known[:28])
    rounds = [step for step in steps[1:] if step.full]
    assert [step.accepted for step in rounds] == [OUTCOMES[n % 5][0] for n in range(len(rounds))] and len(rounds) >= 8
    ahead = [step.ahead for step in rounds[1:]]
    if isinstance(drafter, GivenOverlapDrafter):
        assert [levels == 3 for levels in ahead] == [OUTCOMES[n % 5][1] for n in range(len(ahead))]
    else:
        assert set(ahead) == {None}


@pytest.mark.slow
def test_it_measures_and_reports(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    words = "--shape tiny --video-tokens 64 --accepted 2 --hits 1,0 --draft-weights bf16 --device cpu --ahead 9 --rounds 4"
    monkeypatch.setattr(sys, "argv", ["overlap", *words.split(), "--trees", "chain:3", "--warmup", "1", "--out", str(out)])
    main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["autoregressive", "without", "with", "with"]
    assert all(row["same_tokens"] and row["accepted_found"] == 2 for row in rows[1:])
    assert [row["hits_found"] for row in rows[1:]] == [None, 1.0, 0.0] and rows[2]["levels_ahead"] == 3
    assert len(list(times(rows))) == 4


@pytest.mark.slow
def test_starts_are_timed_in_both_orders(tmp_path, monkeypatch, capsys):
    out, rule = tmp_path / "starts.jsonl", early_start.has_own_gpu
    words = "--shape tiny --video-tokens 64 --device cpu --draft-device cpu --pruners uniform,fastv,uv_prune,two_stage"
    monkeypatch.setattr(sys, "argv", ["start", *words.split(), "--out", str(out)])
    start.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["pruner"] for row in rows] == ["uniform", "fastv", "uv_prune", "two_stage"]
    assert all(row["same_tokens"] and row["beside"]["drafter_start_s"] > 0 for row in rows)
    assert len([line for line in capsys.readouterr().out.splitlines() if "draft ready" in line]) == 4
    assert early_start.has_own_gpu is rule


def test_recorded_outcomes_are_those_that_are_reported_and_replayed():
    rows = read("outcomes.jsonl")
    assert {row["family"] for row in rows} == {"qwen2_5_vl", "llava_onevision", "qwen3_vl"}
    (line,) = (line for line in hits(rows) if "Qwen2.5-VL | `two_stage mass=0.2` | `chain:5`" in line)
    mine = [r for r in rows if (r["family"], r["pruner"], r["shape"]) == ("qwen2_5_vl", "two_stage mass=0.2", "chain:5")]
    shares = [sum(hit for _, hit in replayed(mine, most)) / len(replayed(mine, most)) for most in (1, 2, 3, 4)]
    assert line.split("|")[6:10] == [f" {share:.2f} " for share in shares] and shares == sorted(shares)


def test_outcomes_are_spread_evenly():
    found = spread(2.5, 0.75, 8)
    assert [accepted for accepted, _ in found] == [2, 3] * 4 and sum(hit for _, hit in found) == 6


# --- the adviser ------------------------------------------------------------------------------------------------------


def test_a_hidden_round_takes_the_longer_of_check_and_draft():
    costs = Overlapped(draft_pass=4.0, check=18.0, host=1.0)
    assert costs.outcome_ms(4, first=0) == 19.0 + 2.0  # four of five passes end before the check, the fifth after 20 ms
    assert costs.outcome_ms(3, first=0) == costs.outcome_ms(3, first=1) == 19.0  # four passes in 16 ms
    assert costs.outcome_ms(5, first=1) == 1.0 + 20.0 + 4.0  # one level is left
    assert costs.outcome_ms(5, first=None) == 1.0 + 20.0 + 5 * 4.0
    assert costs.round_ms(3, hits=0.5, full=0.2) == 0.5 * 19.0 + 0.5 * (19.0 + 3 * 4.0)
    assert (costs.floor_ms(4, full=0.2), costs.floor_ms(5, full=0.2)) == (18.0, 5.2 * 4.0)


def test_passes_ahead_take_longer_as_a_check_of_many_rows_does():
    costs = Overlapped(draft_pass=4.0, check=22.0, alone=20.0)
    assert costs.pass_ahead == 4.0 * 1.1 and costs.outcome_ms(5, first=0) == 5 * 4.0 * 1.1
    assert costs.outcome_ms(5, first=None) == 5 * 4.0 * 1.1 + 5 * 4.0  # those of the tree are not wide
    assert Overlapped(4.0, check=19.0, alone=20.0).pass_ahead == 4.0  # a check measured faster than a token is noise


def test_hits_are_replayed_from_measured_ranks():
    chain = TreeShape.parse("chain:2")
    # accepted 2, then rank 0 after the leaf: a hit; accepted 0, rank 2: the second correction; accepted 1, rank 3: a miss
    assert outcomes([0, 0, 0, 2, 0, 3], chain) == (2 / 3, 1 / 3)
    assert outcomes([0, 0, 0, 2, 0, 3], chain, corrections=1) == (1 / 3, 1 / 3)
    assert outcomes([], chain) == (0.0, 0.0)


def test_a_hidden_draft_is_predicted_for_trees_alone():
    found = [
        Candidate("tree", "chain:3", 0.9, 2.0, "measured", 12.0, 18.0, 1.0),
        Candidate("self", "chain:3", 0.9, 3.0, "measured", 54.0, 18.0, 1.0),
    ]
    (one,) = overlapped(found, {("tree", 0.9): Replay((0, 0, 0, 0) * 4)}, alone_ms=18.0)
    assert (one.drafter, one.round_ms, one.accepted) == ("overlap", 18.0, 2.0)
    assert one.words == ["drafter=overlap", "drafter.shape=chain:3", "ratio=0.9"]
    (guessed,) = overlapped(found, {("tree", 0.5): Chances((0.8,))}, alone_ms=18.0)
    assert 18.0 < guessed.round_ms < 30.0
