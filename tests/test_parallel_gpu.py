"""A target over two GPUs: pipelined in one process, tensor-parallel over NCCL, and the results of its kernels there."""

from __future__ import annotations

import copy
import json

import pytest
import ranks_worker
import tiny
import torch
from test_engine import DRAFTERS
from test_tensor import HERE, torchrun

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine, engine_for
from specvlm.models.partition import device_map
from specvlm.parallel.ranks import SINGLE
from specvlm.results.metrics import tokens_of
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def split_over_two(family: str, dtype: torch.dtype, counts: tuple[int, int] = (2, 1)):
    """Move the parts of the tiny model one by one to where Hugging Face's map puts them."""
    hf = copy.deepcopy(tiny.model(family, dtype=dtype).hf)
    for name, device in device_map(hf, counts, [torch.device("cuda", n) for n in range(2)]).items():
        part = hf.get_submodule(name) if name in dict(hf.named_modules()) else None
        if part is not None:
            part.to(device)
        else:
            parent, _, key = name.rpartition(".")
            owner = hf.get_submodule(parent)
            setattr(owner, key, torch.nn.Parameter(getattr(owner, key).to(device), requires_grad=False))
    lm = tiny.wrap(hf)
    assert [stage.device.index for stage in lm.stages] == [0, 1] and lm.head_device.index == 1
    return lm


def draft_on(family: str, dtype: torch.dtype, device: str):
    return tiny.wrap(copy.deepcopy(tiny.draft_of(family, dtype=dtype).hf).to(device))


@pytest.mark.parametrize("draft_device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("drafter", ["tree", "chain", "self", "prompt_lookup"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_split_target_gives_the_whole_ones_output(family, drafter, draft_device):
    whole = tiny.wrap(copy.deepcopy(tiny.model(family, dtype=torch.float32).hf).cuda())
    lm, draft = split_over_two(family, torch.float32), draft_on(family, torch.float32, draft_device)
    for engine in (Engine(), engine_for("graphs", "cuda:0")):
        graph = DecodingGraph(
            lm, draft, TwoStagePruner(), DRAFTERS[drafter], GreedyVerifier(), GenerationOptions(ratio=0.5), engine=engine
        )
        for seed in range(3):
            request = tiny.prompt(family, seed=seed, frames=3 + seed)
            want = tiny.hf_greedy(whole, request, 24)
            assert tokens_of(list(graph.decode(request, 24))) == want, engine.name
            alone = autoregressive(lm, request, 24, GreedyVerifier(), caches=graph.caches, engine=engine)
            assert tokens_of(list(alone)) == want, engine.name


def test_a_split_target_samples_and_penalises_as_a_whole_one(monkeypatch):
    family, outs = "qwen2_5_vl", []
    for lm in (
        tiny.wrap(copy.deepcopy(tiny.model(family, dtype=torch.float32).hf).cuda()),
        split_over_two(family, torch.float32),
    ):
        monkeypatch.setattr(lm, "repetition_penalty", 1.3)
        verifier = SamplingVerifier(temperature=0.8, top_k=20)
        graph = DecodingGraph(
            lm,
            None,
            TwoStagePruner(),
            DRAFTERS["prompt_lookup"],
            verifier,
            GenerationOptions(ratio=0.5),
            engine=engine_for("graphs", "cuda:0"),
        )
        outs.append(tokens_of(list(graph.decode(tiny.prompt(family), 24))))
    assert outs[0] == outs[1]


def test_two_ranks_give_the_output_of_one_process(tmp_path):
    done = torchrun(HERE / "ranks_worker.py", "decode", tmp_path, seconds=300, gpus="0,1")
    assert done.returncode == 0, done.stderr[-4000:]
    shared = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert shared[0] == shared[1]
    for family in ranks_worker.FAMILIES:
        alone = ranks_worker.answers(family, SINGLE)
        for case, tokens in shared[0][family].items():
            what, _, engine = case.partition(" ")
            if what != "sampled":
                assert tokens == alone[f"{what} eager" if engine else what], case


def test_captured_kernels_of_two_ranks_agree_with_their_modules(tmp_path):
    done = torchrun(HERE / "ranks_worker.py", "kernels", tmp_path, seconds=300, gpus="0,1")
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        assert max(json.loads((tmp_path / f"{rank}.json").read_text())["errors"]) < 2e-2


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_dies_ends_the_other(how, tmp_path):
    done = torchrun(HERE / "ranks_worker.py", how, tmp_path, seconds=120, gpus="0,1")
    ours = [line for line in done.stderr.splitlines() if line.startswith("specvlm:")]
    assert len(ours) == 1 and ours[0].startswith("specvlm: rank 1 of 2"), done.stderr[-3000:]
