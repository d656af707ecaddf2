"""The pair benchmark with tiny shapes on the CPU: acceptance is as given, and all figures are written."""

from __future__ import annotations

import json
import sys
from functools import cache
from math import ceil
from pathlib import Path

import pytest
import tiny
import torch

from experiments.gpu_pair.__main__ import main
from experiments.gpu_pair.agreement import agreed
from experiments.gpu_pair.drafter import GivenDrafter, guesses
from experiments.gpu_pair.measure import weight_bytes
from experiments.gpu_pair.models import BenchedLlava, BenchedQwen
from experiments.gpu_pair.options import Options
from experiments.gpu_pair.report import FRAMES, GOALS, MAIN, SPREAD, against_hf, read, targets, targets_spread
from experiments.gpu_pair.shapes import SHAPES, build, model_class, prompt_of
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import UserError
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, TreeShape

PACKAGES = ("tiny_smolvlm2", "tiny_llava_next", "tiny_glm4v")

SMALL = ["video_tokens=64", "rounds=3", "warmup=1", "prefills=1", "device=cpu"]
FAST = [*SMALL, "ratio=0.5,0", "accepted=2,3.5"]


@cache
def known_of(family: str) -> tuple[int, ...]:
    """Decode the target's own answer, 48 tokens."""
    steps = autoregressive(tiny.model(family), tiny.prompt(family), 48, GreedyVerifier())
    return tuple(token for step in steps for token in step.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", ["paper", "chain:4", "3x2x1x1", "[[1],[2],[1,0],[1,0,0],[1,0,0,3]]"])
@pytest.mark.parametrize("accepted", [0, 1.5, 3, 4])
def test_given_acceptance_is_met_in_every_round(family, shape, accepted):
    target, draft, request = tiny.model(family), tiny.draft_of(family), tiny.prompt(family)
    known, limit = known_of(family), 1 + 9 * (1 + ceil(accepted))  # of nine rounds or more
    drafter = GivenDrafter(TreeDrafter(shape), known, accepted)
    steps = list(
        DecodingGraph(target, draft, TwoStagePruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=0.5)).decode(
            request, limit
        )
    )
    assert tuple(token for step in steps for token in step.tokens) == known[:limit]
    found = [step.accepted for step in steps[1:] if step.full]
    assert len(found) >= 8
    assert found[:8:2] == [int(accepted)] * len(found[:8:2])
    assert found[1:8:2] == [int(accepted + 0.5)] * len(found[1:8:2])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_given_acceptance_is_met_by_the_graphs_engine(family):
    target, draft, request = tiny.model(family), tiny.draft_of(family), tiny.prompt(family)
    known = known_of(family)
    drafter, engine = GivenDrafter(TreeDrafter("paper"), known, 3.5), GraphsEngine("direct")
    graph = DecodingGraph(
        target, draft, TwoStagePruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=0.5), engine=engine
    )
    for _ in range(2):  # the second request runs what the first has captured
        steps = list(graph.decode(request, 48))
        assert tuple(token for step in steps for token in step.tokens) == known
        assert [step.accepted for step in steps[1:9]] == [3, 4] * 4


def test_no_guess_of_another_branch_is_right():
    shape = TreeShape.parse("paper")
    known = torch.arange(5, 25).tolist()
    rows = guesses(shape, known, 2, 97)
    right = [[node for node in range(1, len(shape)) if row[node - 1] == known[t + shape.depths[node]]] for t, row in
             enumerate(rows.tolist()[:10])]  # fmt: skip
    assert all(nodes == [1, 5] for nodes in right)
    siblings = [rows[0, [child - 1 for child in children]].tolist() for children in shape.children if children]
    assert all(len(set(tokens)) == len(tokens) for tokens in siblings)


def test_more_accepted_than_the_tree_is_deep_is_refused():
    with pytest.raises(UserError, match="accepted=5: drafter.shape=chain:3 can have 0 to 3"):
        GivenDrafter(TreeDrafter("chain:3"), (), 5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny_llava", "tiny_qwen3", "tiny_experts", "tiny_self", *PACKAGES])
def test_a_run_writes_its_rows_and_prints_its_tables(shape, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    assert main([f"shape={shape}", f"out={out}", *FAST]) == 0
    rows = read(out)
    parts = [row["part"] for row in rows]
    assert {"copy", "bytes", "capture", "start", "hf", "autoregressive", "rounds"} == set(parts)
    rounds = [row for row in rows if row["part"] == "rounds"]
    assert [(row["ratio"], row["accepted"]) for row in rounds] == [(0.5, 2), (0.5, 3.5), (0, 2), (0, 3.5)]
    for row in rounds:
        low, high = int(row["accepted"]), int(row["accepted"] + 0.5)
        assert low <= row["accepted_found"] <= high and row["departures"] == 0
        assert row["ms"] >= row["draft_ms"] > 0 and row["against_ours"] > 0 and row["against_hf"] > 0
    assert next(row for row in rows if row["part"] == "hf")["same_tokens"]
    assert all(row["weights"] == "random weights of a tiny shape" and row["acceptance"] == "given" for row in rows)
    shown = capsys.readouterr().out
    assert "random weights of a tiny shape, at a given acceptance" in shown and "Rounds, at a given acceptance" in shown


@pytest.mark.slow
def test_a_split_target_is_measured_as_a_whole_one_is(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    assert main(["shape=tiny_llava", "parallel=layers", f"out={out}", *FAST]) == 0
    rows = read(out)
    assert {row["parallel"] for row in rows} == {"layers"}
    assert next(row for row in rows if row["part"] == "hf")["same_tokens"]
    assert all(row["departures"] == 0 for row in rows if row["part"] == "rounds")


def test_the_targets_of_several_gpus_take_each_form_and_the_split_ones_generate():
    about = {**SPREAD, "machine": "m", "draft_weights": "bf16", "weights": "random", "versions": {}, "commit": "c", "date": ""}
    rounds = {"part": "rounds", "ratio": 0.9, "accepted": 4.0, "ms_per_token": 10.0, "against_ours": 3.1}
    rows = []
    for tokens in FRAMES.values():
        rows.append(about | {"part": "hf", "parallel": "layers", "video_tokens": tokens, "ms_per_token": 120.0})
        for form in ("layers", "tensor"):
            rows.append(about | rounds | {"parallel": form, "video_tokens": tokens})
            rows.append(about | {"part": "autoregressive", "parallel": form, "video_tokens": tokens, "ms_per_token": 26.0,
                                 "floor_ms": 18.0})  # fmt: skip
    lines = targets_spread(against_hf(rows)).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[4:6] for line in lines[4:]}
    assert found["tensor, 64 frames, against Hugging Face generate, device_map"][0].strip() == "12.00 x"
    assert found["layers, 64 frames, against our autoregressive in the same form"][1].strip() == "pass"
    assert found["tensor, 128 frames, autoregressive over its bandwidth floor"][1].strip() == "MISS"


@pytest.mark.slow
def test_a_prefill_left_out_and_quantised_weights(tmp_path, capsys):
    pytest.importorskip("specvlm.models.quantize")
    out = tmp_path / "results.jsonl"
    words = ["shape=tiny", f"out={out}", *SMALL, "ratio=0.5", "accepted=2", "prefill=random"]
    assert main([*words, "draft_weights=bf16,int8", "target_weights=int8"]) == 0
    rows = read(out)
    assert not {"start", "hf"} & {row["part"] for row in rows}
    assert [row["draft_weights"] for row in rows if row["part"] == "rounds"] == ["bf16", "int8"]
    assert all(row["accepted_found"] == 2 for row in rows if row["part"] == "rounds")
    sizes = [row["draft_weight_bytes"] for row in rows if row["part"] == "bytes"]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.slow
def test_every_draft_is_held_against_the_same_generate(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    assert (
        main(["shape=tiny", f"out={out}", *SMALL, "ratio=0.5", "accepted=2", "draft_weights=bf16,int8", "only=hf,rounds"]) == 0
    )
    rows = read(out)
    (hf,) = (row for row in rows if row["part"] == "hf")
    rounds = [row for row in rows if row["part"] == "rounds"]
    assert [row["draft_weights"] for row in rounds] == ["bf16", "int8"]
    assert all(row["against_hf"] == pytest.approx(hf["ms_per_token"] / row["ms_per_token"], rel=0.01) for row in rounds)


@pytest.mark.slow
def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    def gone(self, ratio, repeats):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("experiments.gpu_pair.measure.Bench.start", gone)
    out = tmp_path / "results.jsonl"
    assert main(["shape=tiny", f"out={out}", *SMALL, "ratio=0.5", "accepted=2", "only=start,rounds"]) == 0
    rows = read(out)
    assert [row["error"] for row in rows if row["part"] == "failed"] == ["out of memory"]
    assert any(row["part"] == "rounds" for row in rows)
    assert "out of memory" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    assert main(["shape=tiny", f"out={tmp_path / 'results.jsonl'}", *SMALL, "limit_s=0"]) == 0
    assert "skipped, limit_s=0 was over: copy; make the target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("video_token=64", 'Did you mean "video_tokens"'),
        ("shape=tinny", 'Did you mean "tiny"'),
        ("draft_weights=fp4", "draft_weights=fp4: expected bf16"),
        ("ratio=2", "ratio=2: expected shares"),
        ("ratio=a", "ratio=a: expected numbers"),
        ("rounds=many", "rounds=many: expected a number"),
        ("draft=x", "target=FOLDER and draft=FOLDER go together"),
        ("parallel=layer", 'Did you mean "layers"'),
        ("parallel=tensor", "parallel=tensor and torchrun go together"),
        ("draft_parallel=tensor", "expected tensor, with parallel=tensor"),
        ("tree=chain:3", "tree=chain:3 can have 0 to 3 accepted"),
        ("tree=chain", "none of: paper, chain:5"),
    ],
)
def test_a_mistake_is_one_line(word, said, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (2, ["only=hf"], "only=hf: hf is not measured with parallel=tensor"),
        (2, ["only=rounds,advise"], "only=rounds,advise: advise is not measured"),
        (3, [], "parallel=tensor: 2 KV heads cannot be shared by 3 ranks; use --nproc-per-node 2, or take parallel=layers"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_ranks_is_said_once(rank, ranks, words, said, capsys, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": ranks, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("specvlm.app.cli.AFTER_YOU_S", 0)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # which another rank than the first closes
    assert main(["shape=tiny_llava", "parallel=tensor", "device=cpu", *words]) == 2
    error = capsys.readouterr().err
    assert (said in error and len(error.splitlines()) == 1) if rank == 0 else not error


def test_what_only_one_process_measures_is_no_part_of_the_usual_ones(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Options.parse(["parallel=tensor"]).only == "copy,capture,start,rounds"


def test_disagreement_is_an_exit_code():
    exact = {"dtype": "float32", "different": [], "autoregressive_same": True}
    tie = {"dtype": "bfloat16", "different": [{"verdict": "tie"}]}
    assert agreed([]) and agreed([exact, tie])
    assert not agreed([exact | {"different": [{"verdict": "tie"}]}]) and not agreed([exact | {"autoregressive_same": False}])
    assert not agreed([tie | {"different": [{"verdict": "mismatch"}]}])


def test_lists_and_numbers_are_read():
    options = Options.parse(["ratio=0.9", "accepted=[2,3]", "rounds=7", "limit_s=500"])
    assert options.numbers("ratio") == [0.9] and options.numbers("accepted") == [2, 3]
    assert (options.rounds, options.limit_s) == (7, 500.0)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("qwen2_5_vl_32b_7b", 33.45),
        ("llava_onevision_72b_7b", 73.18),
        ("qwen2_5_vl_7b_3b", 8.29),
        ("smolvlm2_500m_256m", 0.51),
        ("llava_next_video_7b_self", 7.06),
        ("glm4_1v_9b_self", 10.29),
    ],
)
def test_shapes_have_the_released_models_parameters(shape, billions):
    with torch.device("meta"):
        hf = model_class(SHAPES[shape].target)(SHAPES[shape].target.config())
    assert round(sum(p.numel() for p in hf.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize(("shape", "wrap"), [("tiny", BenchedQwen), ("tiny_llava", BenchedLlava)])
def test_a_built_model_has_the_buffers_of_a_made_one(shape, wrap):
    own = SHAPES[shape].target
    lm = build(own, wrap, torch.device("cpu"), torch.float64)
    made = dict(model_class(own)(own.config()).named_buffers())
    assert made and all(torch.equal(buffer, made[name]) for name, buffer in lm.hf.named_buffers())
    assert len(prompt_of(lm, own, 64, pixels=False).video_index) in (64, 7 * 9 + 1)
    held = sum(p.numel() for name, p in lm.hf.named_parameters() if ".layers." in name and "language_model" in name)
    assert weight_bytes(lm) == 8 * (held + own.text.width + own.text.width * own.text.vocabulary)


def test_the_results_show_every_plot():
    """They are added by hand to what the report prints."""
    folder = Path(__file__).parents[1] / "experiments" / "gpu_pair"
    text = (folder / "RESULTS.md").read_text()
    assert [plot.name for plot in folder.glob("*.png") if f"]({plot.name})" not in text] == []


def test_every_target_has_its_figure_when_its_rows_are_there():
    about = MAIN | {"engine": "graphs", "video_tokens": 16384}
    rounds = {"part": "rounds", "ratio": 0.9, "accepted": 4.0, "check_ms": 20.0, "against_hf": 9.0, "floor_ms": 35.0}
    rows = [about | {"part": "autoregressive", "ms_per_token": 20.0, "draft_weights": "bf16"}]
    rows += [about | rounds | {"draft_weights": "bf16", "ms": 43.0, "draft_pass_ms": 4.5, "against_ours": 2.2}]
    rows += [about | rounds | {"draft_weights": "int8", "ms": 33.0, "draft_pass_ms": 2.5, "against_ours": 2.8}]
    rows += [about | rounds | {"video_tokens": 131072, "draft_weights": "bf16", "ms": 50.0, "floor_ms": 42.0}]
    start = {"part": "start", "ratio": 0.9, "draft_weights": "bf16"}
    rows += [about | start | {"target_start_ms": 2000.0, "draft_start_ms": 1200.0, "peak_gib": 90.0}]
    lines = targets(json.loads(json.dumps(rows))).splitlines()[4:]
    missed = [line for line in lines if "MISS" in line]
    assert len(lines) == len(GOALS) and sum("pass" in line.split("|")[-2] for line in lines) == len(GOALS) - 2
    assert [line.split("|")[1].strip()[:13] for line in missed] == ["autoregressiv", "drafter start"]
