"""Numbers written by others have bounds, and files that grow, nest or never end are not read."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from foreign import FAST, empty_folder, refused  # noqa: F401

from specvlm.__main__ import main
from specvlm.app.compose import compose, jobs
from specvlm.errors import StrategyError, UserError
from specvlm.parsing import files as outside
from specvlm.results.rows import summary_of
from specvlm.strategies import Pruner, registry
from specvlm.types import TreeShape, Within

HUGE = "99999999999999999999999"


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        (["frames=16385"], "16384"),
        ([f"frames={HUGE}"], "16384"),
        (["max_new_tokens=131073"], "131072"),
        (["fps=1e308"], "1000"),
        (["fps=inf"], "1000"),
        ([f"max_pixels={HUGE}"], "67108864"),
        (["repetition_penalty=1e-300"], "0.01"),
        (["repetition_penalty=nan"], "100"),
        (["threads=100000"], "at most"),
        ([f"turn={HUGE}"], "1000000"),
        (["seed=9223372036854775808"], "9223372036854775807"),
        (["dataset=synthetic", "shard=0/99999"], "4096"),
        (["device=cuda:99999999999999999999"], "cuda:1"),
        (["drafter.shape=1000000000"], "1024 guesses"),
        (["drafter.shape=chain:20000"], "128 deep"),
        (["drafter.shape=9x9x9x9x9x9x9x9x9"], "1024 guesses"),
        (["drafter=dynamic_tree", "drafter.depth=100000000"], "128"),
        (["drafter=entropy_tree", f"drafter.nodes={HUGE}"], "1024"),
        (["drafter=prompt_lookup", "drafter.max_ngram=1000000"], "64"),
        (["drafter=sparse", "drafter.length=-1"], "128"),
        (["dataset=synthetic", f"dataset.scenes={HUGE}"], "100000"),
        (["dataset=folder", "dataset.root=x", "dataset.limit=0"], "10000000"),
        (["verifier=sampling", "verifier.temperature=1e-300"], "0.001"),
        (["pruner.mass=nan"], "at most 1"),
        (["frames=true"], "int"),
        (["frames=2.5"], "int"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_number_out_of_bounds_is_refused_with_its_bounds(words, bound):
    with pytest.raises(UserError) as caught:
        compose(words)
    assert bound in str(caught.value) and words[-1].partition("=")[0].rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["seed=range(0,100000000)"], ["ratio=range(0,1,1e-9)"], ["seed=range(0,1,0)"], ["seed=range(0,99)", "turn=range(1,99)"]],
)
def test_a_sweep_of_too_many_jobs_is_refused_before_they_are_made(words):
    with pytest.raises(UserError, match="1000"):
        jobs(words, sweep=True)


def test_a_strategy_that_fails_when_it_is_made_costs_its_own_job_of_a_sweep(monkeypatch):
    def build(kind, node):
        raise StrategyError("pruner=odd raised SystemExit: 0")

    monkeypatch.setattr(registry, "build", build)
    assert len(jobs(["seed=1,2"], sweep=True)) == 2
    with pytest.raises(StrategyError):
        jobs(["seed=1"], sweep=False)


@dataclass(frozen=True)
class BoundPruner(Pruner):
    """Pruner of a plugin."""

    name = "bound"
    plain: int = 1
    share: float = 0.5
    steps: Annotated[int, Within(1, 8)] = 2
    layers: tuple[Annotated[int, Within(0, 40)], ...] = (1,)
    twice: Annotated[int, Within(0, 9), Within(5, 7)] = 6
    ends: tuple[Annotated[int, Within(0, 1)], Annotated[int, Within(5, 10)]] = (0, 5)
    all_of: Annotated[list[Annotated[int, Within(0, 99)]], Within(10, 1000)] = field(default_factory=lambda: [50])
    many: dict[str, Annotated[int, Within(0, 5)]] | None = None

    def select(self, ctx):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"plain": 2**40}, "2147483647"),
        ({"share": float("nan")}, "1e+30"),
        ({"steps": 9}, "at most 8"),
        ({"layers": [1, 41]}, "at most 40"),
        ({"twice": 8}, "at most 7"),
        ({"ends": [2, 5]}, "at most 1"),
        ({"ends": [1, 4]}, "at least 5"),
        ({"all_of": [5]}, "at least 10"),
        ({"all_of": [100]}, "at most 99"),
        ({"many": {"a": 6}}, "at most 5"),
    ],
)
def test_a_plugins_fields_have_the_bounds_of_their_types_and_their_own(fields, bound, monkeypatch):
    info = registry.describe(BoundPruner, "x")
    monkeypatch.setattr(registry, "find", lambda kind, name: info)
    assert registry.build("pruner", {"name": "bound", "layers": [0, 40]}).layers == (0, 40)
    with pytest.raises(UserError, match="pruner=bound: ") as caught:
        registry.build("pruner", {"name": "bound"} | fields)
    assert bound in str(caught.value)


@pytest.mark.parametrize("bounds", [(5, 1), ("a", "b"), (None, None), (float("nan"), 1), (0, "9")], ids=str)
def test_bounds_that_are_none_are_refused_where_they_are_written(bounds):
    with pytest.raises(ValueError, match="two numbers"):
        Within(*bounds)


def test_a_plugin_whose_bounds_are_none_is_left_out_with_a_reason(monkeypatch):
    @dataclass(frozen=True)
    class Swapped(Pruner):
        name = "swapped"
        steps: Annotated[int, Within(8, 1)] = 2

        def select(self, ctx):
            raise NotImplementedError

    monkeypatch.setattr(sys.modules[__name__], "Swapped", Swapped, raising=False)
    with pytest.raises(registry.PluginError, match="Swapped.*two numbers"):
        registry.describe(Swapped, "x")


BOMB = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))])


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 100_000, "a: !!python/object/apply:os.system [ls]", "a: [1", "\0"])
def test_yaml_that_grows_nests_or_runs_is_refused(text):
    path = Path("config.yaml")
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        outside.read_yaml(path)
    Path("conf/experiment").mkdir(parents=True)
    shutil.copy(path, "conf/experiment/mine.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        jobs(["experiment=mine"], sweep=False, folder=Path("conf"))


def test_aliases_of_a_bearable_size_are_read():
    Path("a.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert outside.read_yaml(Path("a.yaml")) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("what", ["pipe", "device", "large"])
def test_what_is_no_file_or_too_large_is_not_read(what):
    path = Path("/dev/zero" if what == "device" else "x.json")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "large":
        path.touch()
        os.truncate(path, 3 << 30)
    with pytest.raises(UserError, match="is not a file|has more than"):
        outside.read_bytes(path)


@pytest.mark.parametrize("text", ["[[0.5]]", "[[true]]", "[]", "[" * 9999, "null", "٣x٣", "chain:²"])
def test_a_tree_of_anything_but_whole_numbers_is_refused(text):
    with pytest.raises(ValueError, match="tree"):
        TreeShape.parse(text)


SAMPLED = ["dataset=synthetic", "dataset.scenes=1"]


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.sweep.subdir=x", "ratio=0.1,0.2"],
        ["hydra.sweep.subdir=x", "ratio=0.1,0.2", *SAMPLED],
        ["ratio=0.5,0.5", *SAMPLED],
        ["resume=true,false", *SAMPLED],
        ["shard=0/2,0/2", *SAMPLED],
        ["hydra.sweep.subdir=${seed}/../x", "seed=1,2", *SAMPLED],
        ["hydra.sweep.subdir=", "seed=1,2"],
    ],
    ids=" ".join,
)
def test_jobs_of_a_sweep_that_share_a_folder_are_refused_before_the_first_starts(words, capfd):
    said = refused(lambda: main(["-m", *words, *FAST, "hydra.sweep.dir=sweep"]), capfd)
    assert "jobs 1 and 2" in said and "into sweep" not in said
    assert not Path("sweep").exists()


def test_hydras_own_keys_are_not_swept(capfd):
    said = refused(lambda: main(["-m", "hydra.sweep.subdir=a/../x,x", *SAMPLED, *FAST, "hydra.sweep.dir=sweep"]), capfd)
    assert "hydra.sweep.subdir" in said and "not supported" in said
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["dataset=folder", "dataset.root=gone"],
        ["dataset=mvbench", "dataset.root=gone"],
        ["dataset=synthetic", "dataset.first=-1"],
        ["dataset=synthetic", "dataset.scenes=???"],
        ["dataset=synthetic", "pruner=two_stage", "pruner.mass=???"],
        ["pruner=two_stage", "pruner.mass=???"],
    ],
    ids=" ".join,
)
def test_a_mistake_of_one_job_leaves_nothing_behind(words, capfd):
    refused(lambda: main([*words, *FAST, "hydra.run.dir=out"]), capfd)
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_mistake_of_one_job_of_several_stands_in_its_folder(capfd):
    assert main(["-m", "dataset=folder", "dataset.root=gone,away", *FAST, "hydra.sweep.dir=sweep"]) == 2
    found = [summary_of(path.parent) for path in Path("sweep").glob("*/summary.json")]
    assert [summary["status"] for summary in found] == ["failed", "failed"]
    assert all("questions.jsonl: no such file" in summary["reason"] for summary in found)


@pytest.mark.parametrize("words", [["ratio=0.5,0.5"], ["shard=0/2,1/2", *SAMPLED], ["ratio=0.5,0.6", *SAMPLED]], ids=" ".join)
def test_jobs_of_folders_of_their_own_and_shards_are_taken(words):
    assert len(jobs([*words, "hydra.sweep.dir=sweep"], sweep=True)) == 2
