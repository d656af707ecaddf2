"""The evidence on published strategies: how its rows and verdicts are made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from rounding import additions, assert_same_sums

from experiments.strategies import cost_table, costs, evaluate, report
from experiments.strategies.evaluate import Scene, encode, frames_of
from experiments.strategies.settings import (
    KEPT_SPARSE,
    MERGERS,
    PLUGINS,
    RATIO,
    TREE,
    Setting,
    Together,
    Unmerged,
    drafter_for,
    groups,
    layer_of,
    pruners,
    registered,
    settings,
    weighs,
)
from specvlm.decoding.collect import codec, collector_for, gathered
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefill import prefill
from specvlm.errors import UserError
from specvlm.models import families
from specvlm.strategies import Pruner, plugins
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, KeepSet, TokenGrid

GRID, WIDTH = TokenGrid(6, 4, 4), 8


def test_every_package_of_the_repository_and_every_built_in_has_rows():
    named = {pruner.name for pruner in pruners().values()}
    assert named == set(registered()) and {"uniform", "two_stage", "flashvid", "codec", "frame_diff"} <= named
    others = len(set(families.PACKAGES.values())) + len(
        ["specvlm_tensorboard"]
    )  # packages of model families and of a tracker bring none
    assert len(named) == 7 + len(list(PLUGINS.glob("*/specvlm_*.py"))) - others
    table = list(settings("qwen2_5_vl"))
    assert len(set(table)) == len(table)
    assert {s.ratio for s in table if (s.drafter, s.pruner) == (TREE, "uniform")} == {0.5, 0.75, 0.9, 0.95, 1.0}


def test_a_variant_that_is_the_default_has_one_row_that_names_the_value():
    assert "flashvid" not in pruners()
    variants = [pruner for name, pruner in pruners().items() if name.startswith("flashvid saliency=") and name[-1] != "d"]
    assert registered()["flashvid"]() in variants and len({p.saliency for p in variants}) == 2


@pytest.mark.parametrize("layers", [2, 4, 28])
def test_a_group_reads_states_behind_one_layer_and_weighs_rows_by_one_rule(layers):
    sparse = registered()["sparsevlm"]
    some = pruners() | {"more": registered()["dart"](layer=1), "other": sparse(layers=(1,), schedule=(1.0,))}
    parts = groups(some, layers)
    assert sorted(name for part in parts for name in part.members) == sorted(some)
    for part in parts:
        assert len({layer_of(p, layers) for p in part.members.values()} - {0}) <= 1
        assert len({p for p in part.members.values() if weighs(p)}) <= 1
        assert part.needs == frozenset().union(*(p.needs for p in part.members.values()))
    assert len(parts) <= 3


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_a_group_gathers_is_what_each_member_would_gather_alone(family):
    target, request = tiny.model(family), tiny.prompt(family)

    def gather(pruner: Pruner) -> tuple:
        collector = collector_for(pruner, target, request)
        clock = SimpleNamespace(mark=lambda part: None)
        return collector, prefill(target, request, target.new_cache(len(request)), clock, collector)[0]

    for part in groups(pruners(), target.layers):
        collector, features_ND = gather(part)
        for pruner in part.members.values():
            alone, other_ND = gather(pruner)
            mine, theirs = (
                gathered(pruner.needs, request, collector, features_ND),
                gathered(pruner.needs, request, alone, other_ND),
            )
            assert mine.keys() == theirs.keys() == {name for name in pruner.needs if not name.startswith("draft_")}
            for name in mine:
                assert_same_sums(mine[name], theirs[name], additions(target.hf, len(request)))


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "setting",
    [
        Setting(TREE, "storm", 0.5),  # merges
        Setting("self chain:5", "two_stage mass=0.2", RATIO),
        Setting(KEPT_SPARSE, "uniform", RATIO),  # reads the target's cache as it grows
    ],
    ids=str,
)
def test_a_row_accepts_what_a_decode_accepts(family, setting, monkeypatch):
    monkeypatch.setattr(evaluate, "LIMIT", 40)
    target, draft, request = tiny.model(family), tiny.draft_of(family), tiny.prompt(family)
    pruner, drafter = pruners()[setting.pruner], drafter_for(family, setting.drafter, request)
    collector = collector_for(Together({"": pruner}, target.layers), target, request, drafter.needs)
    scene = Scene(SimpleNamespace(family=family, target=target, draft=draft), 0, request, collector)
    row = scene.row(setting)
    graph = DecodingGraph(target, draft, pruner, drafter, GreedyVerifier(), GenerationOptions(ratio=setting.ratio))
    steps = list(graph.decode(request, 40))
    assert [token for step in steps for token in step.tokens] == scene.answer
    assert row["accepted"] == [step.accepted for step in steps[1:] if step.full] and row["rounds"] == len(steps) - 1
    passes = 5 * row["rounds"]
    own = drafter.model == "target"
    assert (row["target_passes"], row["draft_passes"]) == ((passes, 0) if own else (0, passes))
    assert "features" not in vars(draft) and "append_hidden" not in vars(target) | vars(draft)


def test_frames_are_those_with_a_kept_token_newlines_aside():
    request = SimpleNamespace(grids=(TokenGrid(3, 1, 2, newline=1), TokenGrid(2, 1, 2)))
    assert frames_of(KeepSet(torch.tensor([0, 1, 5, 6, 9]), 11), request) == 3


@pytest.mark.slow
def test_the_codec_reads_an_encoding_and_the_frames_stay_as_drawn(tmp_path):
    pytest.importorskip("av")
    from experiments.embedded_pair.evaluate import scene_request
    from specvlm.config import model_folder
    from specvlm.models.load import load

    target = load(model_folder("embedded:llava_onevision/target"), "float32")
    encode(128, file := tmp_path / "scene.mp4")
    with_file, without = (scene_request(target, "llava_onevision", "caption", 128, origin)[0] for origin in (file, None))
    assert torch.equal(with_file.videos[0]["pixels"], without.videos[0]["pixels"])
    motion_N, bytes_N, _ = codec(with_file)
    assert (motion_N > 0).any() and (bytes_N[: with_file.grids[0].cells] > 0).all() and not codec(without).any()


@pytest.mark.parametrize("content", costs.CONTENTS)
def test_costs_of_every_pruner_on_a_tiny_grid(content):
    merging = set()
    for name, pruner in pruners().items():
        if pruner.keeps_all or isinstance(pruner, Unmerged):
            continue
        row = costs.measure(pruner, content, torch.device("cpu"), torch.float32, 1, GRID, WIDTH)
        assert "error" not in row, (name, row)
        assert row["ms"] > 0 and 0 < row["kept"] <= KeepSet.budget(len(GRID), RATIO)
        assert ("row_weights_ms" in row) == (name == "sparsevlm")
        merging |= {name} if row["merges"] else set()
    assert {name.split()[0] for name in MERGERS} == {name.split()[0] for name in merging}  # each is tried unmerged, too


def test_a_pruner_that_fails_is_a_row_that_says_so():
    class Broken(UniformPruner):
        def select(self, ctx):
            raise RuntimeError("no room\nat all")

    row = costs.measure(Broken(), "shots", torch.device("cpu"), torch.float32, 1, GRID, WIDTH)
    assert row == {"error": "RuntimeError: no room"}


def test_the_table_of_costs_says_what_is_too_slow_and_what_was_not_run(monkeypatch):
    monkeypatch.setattr(cost_table, "target_prefill", lambda: (2000.0, "a GPU"))
    common = {"machine": "m", "dtype": "float32", "versions": {"torch": "2"}, "date": "2026-11-25T", "commit": "c"}
    gpu = common | {"device": "cuda", "threads": 1, "first_ms": 300.0, "peak_bytes": 2**20, "operations": 7}
    cpu = common | {"device": "cpu", "threads": 1, "operations": 9}
    found = [
        gpu | {"pruner": "fast", "content": "shots", "ms": 400.0},
        gpu | {"pruner": "fast", "content": "shots", "ms": 50.0},  # measured again
        gpu | {"pruner": "slow", "content": "shots", "ms": 20.0},
        gpu | {"pruner": "slow", "content": "noise", "ms": 101.0},
        gpu | {"pruner": "weighing", "content": "shots", "ms": 60.0, "row_weights_ms": 60.0},
        cpu | {"pruner": "elsewhere", "content": "shots", "ms": 999.0},
        cpu | {"pruner": "broken", "content": "shots", "error": "RuntimeError: no"},
    ]
    lines = {line.split("`")[1]: line for line in cost_table.costs(found) if "`" in line}
    ends = {name: line.rstrip(" |").rsplit("| ", 1)[1] for name, line in lines.items()}
    assert ends == {"fast": "yes", "slow": "**no**", "weighing": "**no**", "elsewhere": "not run", "broken": "not run"}
    assert "RuntimeError: no" in lines["broken"] and "20.0 / 101" in lines["slow"] and "60.0 + 60.0" in lines["weighing"]


def rows(pruner, ratio, values, drafter=TREE):
    common = {"drafter": drafter, "pruner": pruner, "ratio": ratio, "kept": 3, "frames": 2, "select_ms": 0.1}
    return [
        common | {"scene": n, "accepted": [v, v], "rounds": 3, "draft_passes": 10, "target_passes": 0}
        for n, v in enumerate(values)
    ]


def test_verdicts_come_from_the_difference_scene_by_scene():
    spread = list(range(1, 9))  # scenes differ far more than pruners
    found = report.Results(
        [
            *rows("uniform", RATIO, spread),
            *rows("good", RATIO, [v + 0.5 for v in spread]),
            *rows("same", RATIO, [v + (-1) ** v for v in spread]),
            *rows("bad", RATIO, [v - 0.25 for v in spread]),
        ]
    )
    gaps = {name: found.against_uniform(name) for name in ("good", "same", "bad", "absent")}
    assert gaps["good"] == pytest.approx((0.5, 0.5, 0.5)) and gaps["bad"][0] == pytest.approx(-0.25) and gaps["absent"] is None
    words = [report.verdict(*gaps[name][1:]) for name in ("good", "same", "bad")]
    assert words == ["better", "no different", "worse"]
    assert report.verdict(0.0, 0.4) == "no different"


def test_a_scene_without_a_whole_round_is_in_no_figure():
    short = rows("uniform", RATIO, [4, 2])
    short[1]["accepted"] = []
    assert report.Results(short).mean(Setting(TREE, "uniform", RATIO), report.accepted) == 4


def test_rows_of_two_different_answers_are_refused():
    scenes = [{"scene": 3, "exact": True, "tokens": 9, "answer": answer} for answer in (1, 2)]
    with pytest.raises(UserError, match="scene 3"):
        report.Results(scenes)
    assert report.Results([scenes[0], scenes[0]]).scenes.keys() == {3}


def test_only_what_stands_between_the_markers_is_replaced():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    once = report.filled(text, "x", iter(["new", "| er |"]))
    assert once == "a\n<!-- x -->\nnew\n| er |\n<!-- /x -->\nb\n" == report.filled(once, "x", iter(["new", "| er |"]))
    with pytest.raises(UserError, match="no markers"):
        report.filled(text, "y", iter([]))


def test_plugins_found_in_the_folder_are_those_that_their_hooks_name():
    import specvlm_dart

    assert registered()["dart"] in plugins.strategies_of(specvlm_dart)
