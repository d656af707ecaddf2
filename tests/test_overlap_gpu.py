"""A draft on a GPU of its own, which starts beside the target's prefill and guesses on during checks, changes no bit."""

from __future__ import annotations

import random
from functools import cache

import packages
import pytest
import torch
from test_batch_gpu import samples_of

from specvlm.config import model_folder
from specvlm.decoding import early_start
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.scheduler import Scheduler
from specvlm.engine import Engine, engine_for
from specvlm.models.load import load
from specvlm.models.side_stream import Mark, SideStream
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Pruner
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FAMILIES = ["qwen2_5_vl", "llava_onevision", "qwen3_vl"]
SHAPES = ["chain:3", "chain:5", "chain:7", "2x2x1", "3x2x1"]
RULES = [GreedyVerifier(), CoupledVerifier(0.8, top_p=0.95), CoupledVerifier(1.0)]
(UV_PRUNE,) = (pruner for pruner in packages.strategies(Pruner) if pruner.name == "uv_prune")
PRUNERS = [UniformPruner(), FastVPruner(1), UV_PRUNE, TwoStagePruner()]


@cache
def pair(family: str) -> tuple[VideoLM, VideoLM]:
    places = (("target", "cuda:0"), ("plain", "cuda:1"))
    target, draft = (load(model_folder(f"embedded:{family}/{which}"), "bfloat16", device) for which, device in places)
    return target, draft


@cache
def prompts(family: str):
    return list(samples_of(pair(family)[0], 9))


def graph_of(family: str, chance: random.Random, engine: Engine) -> DecodingGraph:
    """Choose everything at random."""
    options = GenerationOptions(chance.randint(8, 48), chance.choice([0.5, 0.8, 0.9]), seed=chance.randint(0, 99))
    drafter = OverlapDrafter(chance.choice(SHAPES), corrections=chance.randint(1, 3), ahead=chance.choice([0, 0, 2]))
    strategies = (chance.choice(PRUNERS), drafter, chance.choice(RULES))
    return DecodingGraph(*pair(family), *strategies, options, engine=engine)


def alone(graph: DecodingGraph, prompt) -> list[int]:
    given = (graph.target, prompt, graph.options, graph.verifier, graph.caches, graph.engine)
    return tokens_of(list(autoregressive(*given)))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_for("graphs", "cuda:0")


@pytest.mark.parametrize("seed", range(17))  # with the families 51 requests
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_without_a_drafter_bit_for_bit(family, seed, engine):
    chance = random.Random(seed)
    graph, prompt = graph_of(family, chance, engine), chance.choice(prompts(family))
    target, draft = pair(family)
    assert engine.exact(target) and early_start.has_own_gpu(draft, target)
    steps = list(graph.decode(prompt))
    assert tokens_of(steps) == alone(graph, prompt)
    assert not graph.caches._leased and any(step.keep is not None for step in steps[1:2])


@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kept_tokens_are_those_that_a_draft_has_that_starts_afterwards(family, pruner, engine, monkeypatch):
    kept, drafted = [], OverlapDrafter("chain:3")
    for own in (True, False):
        monkeypatch.setattr(early_start, "has_own_gpu", lambda draft, target, own=own: own)
        graph = DecodingGraph(*pair(family), pruner, drafted, RULES[0], GenerationOptions(8, 0.8), engine=engine)
        steps = list(graph.decode(prompts(family)[0]))
        kept.append(next(step.keep.index.tolist() for step in steps if step.keep is not None))
    # Attention of the text may be read from other kernels' queries and keys, where it runs apart.
    assert len({*kept[0]} & {*kept[1]}) >= (0.9 if pruner.name == "fastv" else 1.0) * len(kept[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_requests_at_once_answer_as_each_alone(family, engine):
    chance = random.Random(len(family))
    graphs = [graph_of(family, chance, engine) for _ in range(8)]
    asked = prompts(family)[:8]
    right = [alone(graph, prompt) for graph, prompt in zip(graphs, asked, strict=True)]
    assert [tokens_of(list(graph.decode(prompt))) for graph, prompt in zip(graphs, asked, strict=True)] == right
    scheduler = Scheduler(engine)
    tickets = [scheduler.submit(graph.work(prompt)) for graph, prompt in zip(graphs, asked, strict=True)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == right


def test_the_side_stream_waits_for_a_mark_and_not_for_what_is_queued_behind_it():
    device = torch.device("cuda:0")
    rows = torch.randn(4096, 4096, device=device)
    side = SideStream(device)
    torch.cuda.synchronize(device)
    value = torch.full((1,), 7.0, device=device)
    ready = Mark(device)
    for _ in range(200):  # about a second
        rows = rows @ rows.softmax(0)
    queued = Mark(device)
    with side.after(ready):
        assert (value + 1).item() == 8.0
    assert not queued.passed
    torch.cuda.synchronize(device)
    assert queued.passed
