"""Tensor parallelism over two processes (gloo): in float32 the output equals one process's, token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from signal import SIGKILL
from time import sleep

import forked
import psutil
import pytest
import ranks_worker
import torch
from rounding import additions, assert_same_sums
from safetensors.torch import load_file

from experiments.gpu_pair.__main__ import main as benchmark
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import ExitCode
from specvlm.models.load import skeleton
from specvlm.parallel.ranks import SINGLE
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.signals import axes_of
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow  # it starts processes
HERE = Path(__file__).parent


def torchrun(*words: object, seconds: float = 600, gpus: str = "", ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Start so many ranks by torchrun itself, on the CPU or on these GPUs. A hang is an error; no process is left."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module", params=["decode", pytest.param("decode every", marks=pytest.mark.exhaustive)])
def by_ranks(request, tmp_path_factory) -> list[dict[str, dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = forked.ranks(partial(ranks_worker.run, request.param, folder), folder)
    assert done.codes == (0, 0), done.err[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_have_the_same_output_in_every_case(by_ranks):
    assert by_ranks[0] == by_ranks[1]
    met = {case for family in ranks_worker.FAMILIES for case in by_ranks[0][family]}
    others = ranks_worker.OF_ONE_ENGINE
    ours = [case for case, *_ in ranks_worker.CASES if case not in others]
    assert met >= {f"{case} {engine}" for case in ours for engine in ("eager", "captured")} | {
        f"{case} captured" for case in others
    }


@pytest.mark.parametrize("family", ranks_worker.FAMILIES)
def test_it_is_the_output_of_one_process(family, by_ranks):
    torch.manual_seed(0)
    alone, shared = ranks_worker.answers(family, SINGLE), by_ranks[0][family]
    for case, tokens in shared.items():
        what, _, engine = case.partition(" ")
        if what != "sampled" or engine == "eager":  # a captured tree draws its noise in another order
            assert tokens == alone[f"{what} eager" if engine else what], case
    assert len(alone["autoregressive eager"]) == ranks_worker.LIMIT
    assert len(shared["sampled captured"]) > ranks_worker.LIMIT


def test_signals_are_the_same_on_both_ranks_and_those_of_one_process(tmp_path):
    done = forked.ranks(partial(ranks_worker.run, "signals", tmp_path), tmp_path)
    assert done.codes == (0, 0), done.err[-4000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = {name: x for family in ranks_worker.FAMILIES for name, x in ranks_worker.signals(family, SINGLE).items()}
    assert set(alone) == set(first) == set(second)
    for key, signal in alone.items():
        family, _, name = key.partition(".")
        target = skeleton(model_folder(f"embedded:{family}/target")).hf
        terms, axes = additions(target, keys=2048), axes_of(name)
        assert torch.equal(first[key], second[key]), key
        assert_same_sums(first[key], signal, terms)
        with pytest.raises(AssertionError):  # the neighbouring token's are further away
            assert_same_sums(first[key], signal.roll(1, axes.index(next(axis for axis in "TND" if axis in axes))), terms)


def test_quantised_shares_give_one_output_both_ways(by_ranks):
    found = by_ranks[0]["quantised"]
    assert len(found) == 4 and all(tokens == found["alone eager"] for tokens in found.values())


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("kill", "specvlm: rank 1 of 2 died without a message"),
        ("raise", "specvlm: rank 1 of 2 ended: the second rank has had enough; the run cannot go on"),
    ],
)
def test_a_rank_that_dies_ends_the_other_with_one_line(how, line, tmp_path):
    done = forked.ranks(partial(ranks_worker.run, how, tmp_path), tmp_path)
    assert (tmp_path / "killed").exists()
    (said,) = done.lines()
    assert said.startswith(line), done.err[-3000:]
    assert done.codes == (ExitCode.LOST, -SIGKILL if how == "kill" else 1)


def test_a_draft_that_is_killed_during_a_check_ends_all_with_one_line(tmp_path):
    done = forked.ranks(partial(ranks_worker.run, "kill draft", tmp_path), tmp_path)
    assert (tmp_path / "killed").exists() and done.codes == (-SIGKILL, ExitCode.LOST)
    (said,) = done.lines()
    assert said.startswith("specvlm: rank 0 of 2 died without a message"), done.err[-3000:]


def test_a_draft_beside_two_ranks_gives_the_rounds_of_one_process(tmp_path):
    done = forked.ranks(partial(ranks_worker.run, "apart decode", tmp_path), tmp_path)
    assert done.codes == (0, 0), done.err[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[:2] == second[:2] and any(first[2][2:]), "nothing was drafted ahead"
    target, draft = (ranks_worker.model("llava_onevision", name, SINGLE) for name in ("target", "plain"))
    strategies = TwoStagePruner(), TreeDrafter("chain:4"), GreedyVerifier()
    graph = DecodingGraph(target, draft, *strategies, GenerationOptions(ratio=0.9))
    steps = list(graph.decode(ranks_worker.prompt_for(target), 60))
    assert first[:2] == [tokens_of(steps), [step.accepted for step in steps]]


@pytest.mark.parametrize(
    ("killed", "line", "codes"),
    [
        ("draft", "specvlm: the draft's process died without a message; the run cannot go on", (2, ExitCode.LOST)),
        ("rank", "specvlm: rank 1 of 2 died without a message", (ExitCode.LOST, -SIGKILL)),
    ],
)
def test_whoever_is_killed_none_is_left_and_one_line_says_why(killed, line, codes, tmp_path):
    done = forked.ranks(partial(ranks_worker.run, f"apart {killed}", tmp_path), tmp_path)
    (said,) = done.lines()
    assert said.startswith(line) and done.codes == codes, (done.codes, done.err[-3000:])
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        sleep(0.1)
    raise AssertionError("the draft's process is left")


def test_the_command_line_runs_on_two_ranks(tmp_path):
    words = [
        "target.parallel=tensor",
        "pair=embedded_llava_onevision",
        "frames=4",
        "max_new_tokens=12",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    done = torchrun("-m", "specvlm", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["verdict"], summary["parallel"], summary["devices"]) == ("identical", "tensor", 2)
    assert done.stdout.count("memory plan:") == 1 and "every layer shared by 2 ranks" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_benchmark_runs_on_two_ranks(tmp_path):
    words = ["shape=tiny_llava", "parallel=tensor", "draft_parallel=tensor", "video_tokens=64"]
    words += ["rounds=3", "warmup=1", "prefills=1"]
    out = tmp_path / "results.jsonl"
    words += ["device=cpu", "ratio=0.5", "accepted=3", f"out={out}"]
    done = forked.ranks(partial(benchmark, words), tmp_path)
    assert done.codes == (0, 0), done.err[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    (rounds,) = (row for row in rows if row["part"] == "rounds")
    assert (rounds["parallel"], rounds["draft_parallel"]) == ("tensor", "tensor")
    assert (rounds["accepted_found"], rounds["departures"]) == (3, 0)
