"""The adviser: costs are fitted and predicted, acceptance is replayed or assumed, and the advice follows from both."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from omegaconf import OmegaConf

from experiments.batch.predicted import pairs
from specvlm.advise import Costs, predict
from specvlm.advise.__main__ import changes, main, three
from specvlm.advise.acceptance import Chances, Replay, of_answer, of_words
from specvlm.advise.advice import Candidate, candidates, recommend
from specvlm.advise.costs import PROBES, Start, Timing, probes, rows_of
from specvlm.advise.loads import loads, measure, prices_of, round_ms, verdict
from specvlm.advise.table import show_loads
from specvlm.advise.wishes import OWN, RATIOS, SHAPES, Wishes
from specvlm.app import compose
from specvlm.app.console import RunConsole
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.results import metrics
from specvlm.strategies import registry
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, TreeShape
from specvlm.types.costs import RoundCost

TEXT, VIDEO = 100, 1000


def invented(draft: float = 2.0, row: float = 0.1, slot: float = 0.001, check: float = 10.0, start: float = 0.5) -> Costs:
    """Invent costs: draft pass `draft` + `row` per row + `slot` per slot; check `check` + 0.2 a node; 10.2 ms alone."""
    timings = []
    for shape, ratio in probes(RATIOS):
        context = TEXT + round(VIDEO * (1 - ratio))
        passes = rows_of(shape)
        ms = len(passes) * (draft + slot * context) + row * sum(passes)
        timings.append(Timing("tree", shape, ratio, context, ms, check + len(TreeShape.parse(shape)) / 5))
    starts = [Start("tree", ratio, 3.0, start * (1 - ratio)) for ratio in RATIOS]
    return Costs(TEXT, VIDEO, 10.2, 3.0, tuple(timings), tuple(starts))


def everything(costs: Costs, accepted: float):
    return candidates(costs, {("tree", 0.9): Chances.of_mean(accepted, TreeShape.parse("paper"))}, {"tree": (SHAPES, RATIOS)})


# ---- costs ---------------------------------------------------------------------------------------------------------------


def test_a_prediction_is_drafting_and_check_over_accepted_and_bonus():
    costs = invented()
    assert rows_of("paper") == (1, 4, 4, 1, 1)
    drafting = 5 * (2.0 + 0.001 * (100 + 100)) + 0.1 * 11
    assert costs.draft_ms("tree", "paper", 0.9) == pytest.approx(drafting)
    assert costs.check_ms("paper") == pytest.approx(10 + 26 / 5)
    assert predict(costs, "paper", 0.9, 4.0) == pytest.approx((drafting + 15.2) / 5)
    assert costs.misfit() < 1e-9


@pytest.mark.parametrize("shape", ["chain:5", "4x2x1x1", "2x2x1x1", "[[0],[1],[0,0]]"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 1.0])
def test_shapes_and_ratios_that_were_not_probed_are_predicted(shape, ratio):
    assert shape not in PROBES
    passes = rows_of(shape)
    drafting = len(passes) * (2.0 + 0.001 * (TEXT + round(VIDEO * (1 - ratio)))) + 0.1 * sum(passes)
    expected = (drafting + 10 + len(TreeShape.parse(shape)) / 5) / 3
    assert predict(invented(), shape, ratio, 2.0) == pytest.approx(expected)


def test_a_cost_that_noise_would_make_negative_is_left_out():
    costs = invented(slot=0.0)
    noisy = [t if t.ratio else replace(t, draft_ms=0.97 * t.draft_ms) for t in costs.timings]  # more context, less time
    fitted = replace(costs, timings=tuple(noisy))
    assert fitted.draft_ms("tree", "chain:8", 0.0) == pytest.approx(fitted.draft_ms("tree", "chain:8", 1.0))
    assert 0.005 < fitted.misfit() < 0.03
    assert fitted.draft_ms("tree", "chain:8", 0.5) == pytest.approx(8 * 2.1, rel=0.02)


def test_one_probe_slowed_down_by_something_else_does_not_bend_the_fit_and_is_told():
    costs = invented()
    slow = [replace(t, draft_ms=2 * t.draft_ms) if (t.shape, t.ratio) == ("chain:8", 0.5) else t for t in costs.timings]
    disturbed = replace(costs, timings=tuple(slow))
    assert disturbed.draft_ms("tree", "chain:8", 0.5) == pytest.approx(costs.draft_ms("tree", "chain:8", 0.5), rel=0.02)
    assert disturbed.misfit() > 0.2


def test_a_profile_of_one_shape_at_one_ratio_predicts_at_least_itself():
    costs = Costs(TEXT, VIDEO, 20.0, 3.0, (Timing("tree", "paper", 0.9, 200, 25.0, 22.0),))
    assert predict(costs, "paper", 0.9, 3.7) == pytest.approx(47 / 4.7)


def test_the_first_probe_needs_the_largest_caches():
    ordered = probes(RATIOS)
    assert ordered[0] == (max(PROBES, key=lambda shape: len(TreeShape.parse(shape))), min(RATIOS))
    assert {ratio for _, ratio in ordered} == set(RATIOS) and {shape for shape, ratio in ordered if ratio == 0.9} == set(PROBES)
    assert all(len(TreeShape.parse(shape)) <= 64 for shape in (*PROBES, *SHAPES))


# ---- acceptance ----------------------------------------------------------------------------------------------------------


def test_replay_follows_the_ranks_through_the_tree():
    # Rounds of chain:2 take 2 + bonus, 0 + bonus, 1 + bonus; the last one is cut short by the end.
    ranks = (0, 0, 0, 3, 0, 1, 0)
    assert Replay(ranks).accepted(TreeShape.parse("chain:2")) == pytest.approx((2 + 0 + 1) / 3)
    # With two guesses on each of two levels: 2 + bonus, then rank 3 misses, 2 + bonus.
    assert Replay(ranks).accepted(TreeShape.parse("2x2")) == pytest.approx((2 + 0 + 2) / 3)
    assert Replay((0,)).accepted(TreeShape.parse("chain:2")) == 1  # a whole answer in one round is better than nothing


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["paper", "chain:4", "2x2x1", "3x1"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_replay_is_what_decoding_accepts(shape, ratio):
    request = tiny.prompt("qwen2_5_vl")
    drafter = TreeDrafter(shape)
    graph = DecodingGraph(
        tiny.model("qwen2_5_vl"),
        tiny.draft_of("qwen2_5_vl", 0.05),
        UniformPruner(),
        drafter,
        GreedyVerifier(),
        GenerationOptions(ratio=ratio),
    )
    answer = metrics.tokens_of(list(autoregressive(graph.target, request, 40, graph.verifier)))
    steps = list(graph.decode(request, 40))
    replayed = of_answer(graph, request, steps[1].keep, answer)
    measured = metrics.acceptance_of(steps)["accepted_per_round"]
    assert 0 < measured < TreeShape.parse(shape).depth
    assert replayed.accepted(TreeShape.parse(shape)) == pytest.approx(measured)


def test_an_assumed_mean_is_that_of_the_papers_tree_and_wider_trees_accept_more():
    chances = of_words("3.5")["tree", 0.9]
    assert chances.accepted(TreeShape.parse("paper")) == pytest.approx(3.5)
    one, two, four = (chances.accepted(TreeShape.parse(shape)) for shape in ("1", "2", "4"))
    assert one < two < four < 1
    assert {at: round(c.accepted(TreeShape.parse("paper")), 6) for (_, at), c in of_words("0:4.5, 0.9:4").items()} == {
        0: 4.5,
        0.9: 4,
    }


def test_acceptance_by_depth_of_a_run_is_reproduced_and_a_shorter_chain_is_its_beginning():
    chances = Chances.of_depths(TreeShape.parse("chain:4"), [0.8, 0.7, 0.5, 0.0], "a run")
    assert chances.accepted(TreeShape.parse("chain:4")) == pytest.approx(2.0)
    assert chances.accepted(TreeShape.parse("chain:2")) == pytest.approx(0.8 + 0.7)
    chances = Chances.of_depths(TreeShape.parse("paper"), [0.75, 0.71, 0.67, 0.62, 0.58], "a run")
    assert chances.accepted(TreeShape.parse("paper")) == pytest.approx(3.33)


def test_acceptance_is_read_from_the_folder_of_a_run(tmp_path):
    cfg = {"drafter": {"name": "tree", "shape": "chain:3"}, "pruner": {"name": "two_stage"}, "ratio": 0.75}
    (tmp_path / "summary.json").write_text(json.dumps({"acceptance_by_depth": [0.9, 0.6, 0.3]}))
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    ((key, chances),) = of_words(str(tmp_path)).items()
    assert key == ("tree", 0.75) and chances.source == f"of {tmp_path.name}"
    assert chances.accepted(TreeShape.parse("chain:3")) == pytest.approx(1.8)
    OmegaConf.save(
        cfg | {"drafter": {"name": "self", "shape": "chain:3"}, "pruner": {"name": "none"}}, tmp_path / "config.yaml"
    )
    assert list(of_words(str(tmp_path))) == [("self", 0.0)]


# ---- advice --------------------------------------------------------------------------------------------------------------


def test_a_cheap_draft_that_is_often_right_is_recommended():
    costs = invented()
    best, (text, *_) = recommend(costs, everything(costs, 4.0), 256)
    assert best and best.token_ms < costs.alone_ms / 2
    assert text.startswith(f"Use {best}: ") and f"{costs.alone_ms / best.token_ms:.2f} x" in text


def test_a_draft_as_dear_as_the_target_is_not():
    costs = invented(draft=10.0)
    best, (text,) = recommend(costs, everything(costs, 2.0), 256)
    assert best is None and text.startswith("Do not speculate here: at best") and "its largest cost is drafting" in text


def test_a_dear_check_is_named():
    costs = invented(draft=0.5, check=60.0)
    best, (text,) = recommend(costs, everything(costs, 3.0), 256)
    assert best is None and "its largest cost is the check" in text


def test_a_start_that_a_short_answer_does_not_win_back_is_named():
    costs = invented(start=1.0)
    found = [c for c in everything(costs, 4.0) if c.ratio < 1]
    best, (text,) = recommend(costs, found, 8)
    assert best is None and "Do not speculate here for 8 tokens" in text and "pays only from" in text
    needed = int(re.search(r"pays only from (\d+) tokens on", text)[1])
    quickest = [min(found, key=lambda c: c.token_ms)]
    assert recommend(costs, quickest, needed)[0] and not recommend(costs, quickest, needed - 1)[0]


def test_pruning_is_said_to_pay_only_where_it_does():
    known = {("tree", ratio): Chances.of_mean(4.0, TreeShape.parse("paper")) for ratio in RATIOS}
    for slot, said in ((0.0, "Pruning does not pay in decoding"), (0.01, "Pruning pays in decoding")):
        costs = invented(slot=slot)
        _, text = recommend(costs, candidates(costs, known, {"tree": (SHAPES, RATIOS)}), 256)
        assert text[-1].startswith(said)


def test_a_drafter_of_no_fixed_shape_is_recommended_as_it_was_measured():
    costs, own = invented(), changes(DynamicTreeDrafter(nodes=9, depth=3))
    measured = Candidate("dynamic_tree", "", 0.9, 4.5, "measured", 9.0, 12.0, 3.0, own)
    best, (text, *_) = recommend(costs, [*everything(costs, 1.0), measured], 256)
    assert best == measured and text.startswith("Use drafter=dynamic_tree drafter.nodes=9 drafter.depth=3 ratio=0.9: ")
    cfg = compose.jobs(best.words, sweep=False)[0].cfg
    assert registry.build("drafter", cfg.drafter) == DynamicTreeDrafter(9, 3) and cfg.ratio == 0.9
    best, (text,) = recommend(costs, [replace(measured, accepted=0.1)], 256)
    assert best is None and text.endswith("1.10 tokens: drafting takes 9.00 ms of it, the check 12.00 ms.")


def test_every_drafter_there_is_is_considered():
    cfg = compose.jobs(["drafter=entropy_tree", "drafter.nodes=40"], sweep=False)[0].cfg
    wishes = Wishes.of_words({})
    others = wishes.others(cfg)
    hidden = replace(cfg, draft=replace(cfg.draft, device="cpu"))  # `overlap` does nothing without a device of its own
    for chosen, left_out in ((cfg, {"overlap"}), (hidden, set())):
        names = {*wishes.trees(chosen), *(drafter.name for drafter in wishes.others(chosen))}
        assert names == registry.collect()["drafter"].keys() - left_out
    assert EntropyTreeDrafter(nodes=40) in others and DynamicTreeDrafter() in others


def test_three_different_configurations_are_checked():
    found = everything(invented(), 4.0)
    best = min(found, key=lambda c: c.token_ms)
    assert len(set(three(found, best))) == 3 and three(found, best)[0] == best == three(found, None)[0]


# ---- several requests at once --------------------------------------------------------------------------------------------


def crowd(by_request: float = 1.0, by_row: float = 0.1, draft: float = 2.0, slots: float = 0.5) -> Costs:
    """Invent rounds of 1 to 8 requests: a pass of 10 ms, more by request and row; drafts that cost more with all video."""
    found = []
    for count in (1, 2, 4, 8):
        found.append(RoundCost(count, count, 0, 0, 0.0, 10 + by_request * count + by_row * count))
        for ratio in (0.0, 0.9):
            for shape in map(TreeShape.parse, ("chain:2", "chain:6")):
                check_ms = 10 + by_request * count + by_row * count * len(shape)
                draft_ms = shape.depth * (draft + (1 - ratio) * slots * count)
                found.append(RoundCost.of_shape(shape, count, draft_ms, check_ms, ratio))
    return replace(invented(), shared=tuple(found))


KNOWN = {("tree", 0.9): Chances((0.8,)), ("tree", 0.0): Chances((0.8,))}


@pytest.mark.parametrize("ratio", [0.0, 0.9])
@pytest.mark.parametrize("requests", [3, 12, 16])
def test_rounds_of_other_numbers_of_requests_are_predicted(ratio, requests):
    shape = TreeShape.parse("chain:4")
    wanted = 10 + requests + 0.1 * requests * 5 + 4 * (2.0 + (1 - ratio) * 0.5 * requests)
    assert round_ms(prices_of(crowd().shared, ratio), shape, requests) == pytest.approx(wanted, rel=0.05)


def test_pruning_gains_with_the_load_and_the_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = loads(crowd(), KNOWN, SHAPES, [0.0, 0.9], 16)
    assert [one.requests for one in found] == [count for count in (1, 2, 4, 8, 12, 16) for _ in range(3)]
    gain = [found[at + 1].token_ms / found[at + 2].token_ms for at in range(0, len(found), 3)]
    assert gain == sorted(gain) and gain[-1] > 1.2
    assert all(one.tokens_per_s == pytest.approx(1000 * one.requests / one.token_ms) for one in found)
    show_loads(RunConsole(), found)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("the target alone") == 6
    assert verdict(found) == "Speculation pays at up to 16 requests at once."


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        (crowd(draft=50.0), "Do not speculate, for any number of requests."),
        (crowd(by_row=4.0, draft=1.0), r"Do not speculate with (2|4|8) or more requests at once\."),
    ],
)
def test_it_says_from_which_load_on_not_to_speculate(costs, said):
    assert re.fullmatch(said, verdict(loads(costs, {("tree", 0.9): Chances((0.5,))}, ("chain:2",), [0.0, 0.9], 16)))


def test_measured_rounds_of_the_benchmark_are_predicted_from_other_numbers_of_requests():
    path = Path(__file__).parent.parent / "experiments" / "batch" / "results.jsonl"
    found = list(pairs([json.loads(line) for line in path.read_text().splitlines()]))
    assert len(found) >= 9 and max(abs(one.error) for one in found if one.requests in (1, 4, 8)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2])
def test_rounds_of_several_requests_are_measured(most):
    graph = DecodingGraph(
        tiny.model("qwen2_5_vl"), tiny.draft_of("qwen2_5_vl"), UniformPruner(), TreeDrafter(), GreedyVerifier()
    )
    found = list(measure(graph, tiny.prompt("qwen2_5_vl"), [0.0, 0.9], most))
    assert [one.requests for one in found] == [count for count in (1, 2)[:most] for _ in range(5)]
    assert [(one.passes, one.ratio) for one in found[:5]] == [(0, 0), (2, 0), (6, 0), (2, 0.9), (6, 0.9)]
    assert all(one.check_ms > 0 and (one.draft_ms > 0) == (one.passes > 0) for one in found)


# ---- the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["drafters=tre"], 'Did you mean "tree"?'),
        (["tokens=few"], "tokens=few: expected a whole number from 8"),
        (["check=maybe"], "check=maybe: expected true or false"),
        (["requests=0"], "requests=0: expected a whole number from 1, at most 16"),
        (["requests=17"], "requests=17: expected a whole number from 1, at most 16"),
        (["acceptance=many"], "acceptance=many: expected a number such as 3.5"),
        (["acceptance=7"], "acceptance=7: expected 0 to 5 accepted"),
        (["acceptance="], "acceptance= has no value"),
        (["acceptance=3", "drafters=self"], "acceptance=3 does not cover drafters=self"),
        (["dataset=synthetic"], "give video=FILE question=… instead of dataset=…"),
        (["costs=nowhere.json", "acceptance=3"], "costs=nowhere.json is not a costs.json of an earlier profile"),
        (["ratoi=0.5"], 'there is no key "ratoi"'),
        (["-m"], "-m: the adviser has no options"),
        (["video=nowhere.mp4"], "nowhere.mp4"),
    ],
)
def test_mistakes_end_in_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and says in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ranks", "words"), [(1, ["target.parallel=tensor"]), (2, ["target.parallel=tensor"]), (2, [])])
def test_ranks_are_refused_before_they_are_asked_for(ranks, words, capsys, monkeypatch):
    if ranks > 1:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": ranks, "RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
    assert main(words) == 2
    assert "the adviser runs in one process: leave out torchrun and target.parallel=tensor" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
def test_help_names_every_word_within_the_terminals_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{key}=…" in shown for key in OWN)
    assert all(meaning in " ".join(shown.split()) for meaning in OWN.values())
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.slow
def test_the_embedded_pair_is_profiled_predicted_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    monkeypatch.setattr("specvlm.advise.wishes.RATIOS", (0.0, 0.9))
    monkeypatch.setattr("specvlm.advise.costs.MISFIT", 100.0)  # once is enough
    words = [
        "question=how many objects appear?",
        "frames=4",
        "max_new_tokens=14",
        "drafters=tree,prompt_lookup,dynamic_tree,sparse",
        "drafter=dynamic_tree",
        "drafter.nodes=9",
        "ratio=0.8",
    ]
    assert main([*words, "check=true", "requests=2", "hydra.run.dir=out"]) == 0
    shown = capsys.readouterr().out
    assert "predicted for requests at once" in shown and "at once" in shown.split("predicted for requests at once")[1]
    assert "the target alone" in shown and "predicted against measured: " in shown
    assert "Use drafter=" in shown or "Do not speculate here" in shown  # which, is a matter of time
    assert sorted(path.name for path in Path("out").iterdir()) == ["advice.json", "check.json", "costs.json"]
    costs, advice = Costs.read(Path("out/costs.json")), json.loads(Path("out/advice.json").read_text())
    assert costs.video == 128 and {t.shape for t in costs.timings} == set(PROBES) and advice["answer_tokens"] == 10
    assert {c["ratio"] for c in advice["candidates"] if c["shape"] == "paper"} == {0.0, 0.8, 0.9}
    measured = {c["drafter"]: c for c in advice["candidates"] if not c["shape"]}
    assert {name: c["ratio"] for name, c in measured.items()} == {"dynamic_tree": 0.8, "sparse": None, "prompt_lookup": None}
    assert measured["dynamic_tree"]["changes"] == ["drafter.nodes=9"]
    assert re.search(r"^dynamic_tree drafter.nodes=9 +0\.8 .* measured ", shown, re.MULTILINE)
    assert 0 < measured["dynamic_tree"]["accepted"] <= 5 and measured["sparse"]["draft_ms"] > 0
    checked = json.loads(Path("out/check.json").read_text())["checked"]
    for row in checked:  # the acceptance is replayed, so it is exact; times are not asked of a busy machine
        assert row["accepted"][0] == pytest.approx(row["accepted"][1])
    # Asked again with the same costs, it needs no model.
    again = ["target.path=nowhere", "costs=out/costs.json", "acceptance=4.8", "requests=16", "hydra.run.dir=again"]
    assert main(again) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ *16 +the target alone ", shown, re.MULTILINE) and len(costs.shared) == 2 * 5
    assert TreeDrafter("auto", costs="out/costs.json").known()[-1] == costs.shared[-1]
    assert "256 tokens" in shown and "assumed, as at 0.9" in shown


def test_the_commands_in_the_guide_compose():
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "adviser.md").read_text(encoding="utf-8")
    lines = [line for line in guide.splitlines() if line.startswith("python -m specvlm.advise")]
    assert lines
    for line in lines:
        words = shlex.split(line.split("  #")[0])[3:]
        own = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
        Wishes.of_words({key: value for key, value in own.items() if key != "costs"})
        assert compose.jobs([word for word in words if word.partition("=")[0] not in OWN], sweep=False)
