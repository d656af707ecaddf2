"""Tree fitting: ranks read from runs, the optimum against every tree of its size, and a warning if it does not help."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import report_jobs
import tiny

from specvlm.app.request import row
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.fit_tree.__main__ import Round, best_tree, expected, fit_ranks, main
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import PAPER_TREE, DraftTree, GenerationOptions, TreeShape

CHANCES = [[0.5, 0.2, 0.1], [0.6, 0.05, 0.3], [0.4, 0.35]]


def steps_of(drafter, verifier=None, engine=None, limit=40):
    family = "qwen2_5_vl"
    graph = DecodingGraph(
        tiny.model(family),
        tiny.draft_of(family),
        UniformPruner(),
        drafter,
        verifier or GreedyVerifier(),
        GenerationOptions(ratio=0.5),
        engine=engine or Engine(),
    )
    return list(graph.decode(tiny.prompt(family), limit))


def simulate(shape, count, seed=0, chances=CHANCES):
    """Simulate rounds of a draft whose ranks are independent by depth, as seen through a tree."""
    chance, below = random.Random(seed), {tuple(p) for p in shape}
    rounds = []
    for _ in range(count):
        path, ranks, widths = (), [], []
        while True:
            tried = 0
            while (*path, tried) in below:
                tried += 1
            widths.append(tried)
            p = chances[len(path)] if len(path) < len(chances) else []
            (rank,) = chance.choices(range(len(p) + 1), [*p, 1 - sum(p)])
            if rank >= len(p) or (*path, rank) not in below:
                break
            ranks.append(rank)
            path = (*path, rank)
        rounds.append(Round(tuple(ranks), tuple(widths)))
    return rounds


def write(folder, rounds):
    folder.mkdir()
    lines = [{"round": 0, "tokens": [1]}] + [{"ranks": r.ranks, "widths": r.widths} for r in rounds]
    (folder / "steps.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_no_tree_of_as_many_nodes_is_worth_more(nodes):
    ways = [w for d in (1, 2, 3) for w in itertools.product(*(range(len(CHANCES[k])) for k in range(d)))]
    every = [tree for tree in itertools.combinations(ways, nodes) if all(len(way) == 1 or way[:-1] in tree for way in tree)]
    best = max(expected([list(w) for w in tree], CHANCES) for tree in every)
    found = best_tree(CHANCES, nodes)
    assert len(found) == nodes and expected(found, CHANCES) == pytest.approx(best, abs=1e-12)
    TreeShape.from_paths(found)
    assert max(map(len, best_tree(CHANCES, 9, depth=2))) == 2


def test_chances_are_recovered_from_rounds_that_a_narrow_tree_censors():
    """The static tree gives worse parents fewer children: a plain share of the rounds would underestimate rank 2."""
    chances = fit_ranks(simulate(PAPER_TREE, 40_000))
    for found, true in zip(chances, CHANCES, strict=False):
        assert found[: len(true)] == pytest.approx(true, abs=0.02)


def test_ranks_of_a_path_by_hand():
    shape = TreeShape.from_paths([[0], [2], [0, 0], [0, 1], [0, 1, 0]])
    tree = DraftTree(None, shape.parents, ranks=shape.ranks)
    assert tree.ranks_on((0,)) == ((), (1,)), "rank 1 was not tried, so rank 2 says nothing about it"
    assert tree.ranks_on((0, 2)) == ((2,), (1, 0))
    assert tree.ranks_on((0, 1, 4, 5)) == ((0, 1, 0), (1, 2, 1, 0))
    assert DraftTree(None, shape.parents).ranks_on((0, 2)) == ((1,), (2, 0))


@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
@pytest.mark.parametrize("drafter", [TreeDrafter(), DynamicTreeDrafter(), TreeDrafter("[[1],[1,0]]")], ids=repr)
def test_steps_tell_the_ranks_that_were_accepted(drafter, engine):
    for step in steps_of(drafter, engine=engine)[1:]:
        assert len(step.ranks) == step.accepted and len(step.widths) == step.accepted + 1
        assert {"ranks", "widths"} < row(1, step).keys()
        if drafter.name == "tree" and drafter.shape.startswith("["):
            assert step.widths[0] == 0 and step.ranks in ((), (1,), (1, 0))
        if drafter.name == "tree" and drafter.shape == "paper":
            assert step.widths[0] == 4 and (not step.ranks or list(step.ranks) in PAPER_TREE)


def test_drawn_guesses_and_lossy_rules_tell_nothing():
    for verifier in (SamplingVerifier(0.8), LooseVerifier()):
        assert all(not step.widths and "widths" not in row(1, step) for step in steps_of(TreeDrafter(), verifier))


@pytest.mark.slow
def test_a_draft_unlike_the_papers_is_fitted_better(tmp_path, capsys):
    steep = [[0.8, 0.1]] * 6  # sure of itself: the paper's tree is too wide for it
    wide = [list(w) for d in range(1, 7) for w in itertools.product(range(2), repeat=d)]
    folders = [write(tmp_path / str(n), simulate(wide, 300, n, steep)) for n in range(4)]
    out = tmp_path / "tree.json"
    assert main([*folders, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "1200 rounds of 4 runs; held out: 2 of 4 runs (600 rounds)" in told and "the fit beats the paper's tree by" in told
    tree = TreeShape.parse(str(out))
    assert len(tree) == 26 and tree.depth == 6
    assert tokens_of(steps_of(TreeDrafter(str(out)))) == tokens_of(steps_of(TreeDrafter()))


def test_a_fit_that_does_not_help_is_called_so(tmp_path, capsys):
    """Few rounds, which the paper's tree covers fully, while the fit may choose among few paths only."""
    folders = [write(tmp_path / "a", [Round((0,), (4, 3))] * 3), write(tmp_path / "b", [Round((3, 0), (4, 1, 0))] * 9)]
    assert main([*folders, "--out", str(tmp_path / "tree.json")]) == 0
    assert "does NOT beat the paper's tree: use drafter.shape=paper" in capsys.readouterr().out
    assert (tmp_path / "tree.json").exists()


def write_job(folder, rounds, samples=("scene-0000", "scene-0001", "scene-0002")):
    """Write the folder of a job, with the same rounds for each sample."""
    lines = [{"tokens": [1], "ranks": one.ranks, "widths": one.widths} for one in rounds]
    report_jobs.job(folder, [report_jobs.row(index) for index in range(len(samples))], dict.fromkeys(samples, lines))


def test_a_sweep_is_fitted_sample_by_sample(tmp_path, capsys):
    for name in ("one", "two"):
        write_job(tmp_path / "sweep" / name, [Round((0,), (4, 3))] * 2)
    write_job(tmp_path / "sweep" / "sampled", [])  # records no ranks
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "tree.json")]) == 0
    assert "12 rounds of 3 runs; held out: 1 of 3 runs (4 rounds)" in capsys.readouterr().out
    assert main([str(tmp_path / "sweep" / "one"), "--out", str(tmp_path / "tree.json")]) == 0
    assert "6 rounds of 3 runs; held out: 1 of 3 runs (2 rounds)" in capsys.readouterr().out
    assert main([str(tmp_path / "sweep" / "sampled"), "--out", str(tmp_path / "tree.json")]) == 2
    assert "records no ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rounds", "options", "message"),
    [
        (None, [], "has no steps.jsonl"),
        ([], [], "records no ranks"),
        ([Round((), (4,))], [], "no guess was ever accepted"),
        ([Round((0,), (4, 0))], ["--nodes", "0"], "at least 1, got 0"),
        ([Round((0,), (4, 0))], ["--out", "tree.txt"], "ends in .json"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_line(tmp_path, capsys, rounds, options, message):
    folder = str(tmp_path / "none") if rounds is None else write(tmp_path / "run", rounds)
    assert main([folder, "--out", str(tmp_path / "tree.json"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
