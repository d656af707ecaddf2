"""Requests that share captured passes on a GPU: each has the bits, and the answer, that it has alone."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, replace
from math import inf
from threading import Thread

import pytest
import torch
from test_engine_gpu import kernels
from test_exact_gpu import WIDTHS, random_parents, rows

from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.scheduler import Scheduler, alone
from specvlm.engine import engine_for
from specvlm.engine.contexts import Contexts, Shape, addresses, frame_of, layout_of
from specvlm.models.kv_cache import KVCache
from specvlm.models.load import load
from specvlm.models.passes import Pass
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter, tables_of
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, GenerationOptions
from specvlm.types.tree import depths_of

pytestmark = pytest.mark.gpu
BASES = [17, 511, 600, 1024, 0, 300, 900, 1100, 64, 63, 512, 1279, 130, 700, 1, 1023]


def trees_of(count: int, most: int) -> list[tuple[int, ...]]:
    """Make trees of one to `most` nodes, deep and wide ones."""
    chance = random.Random(count)
    return [random_parents(chance.randint(1, most), seed) if seed else (-1,) for seed in range(count)]


@pytest.mark.parametrize(("heads", "further"), [*((heads, 0) for heads in WIDTHS), ((40, 8, 128), 15_872)])
@pytest.mark.parametrize(("requests", "most"), [(2, 26), (8, 8), (16, 4)])
@torch.inference_mode()
def test_rows_of_several_requests_have_the_bits_that_each_has_alone(heads, further, requests, most):
    """Queries, keys, values and attention, with caches of unlike capacities; also where chunks of 8 KV heads double."""
    count, kv, width = heads
    dtype, layer, cpu = torch.bfloat16, 1, torch.device("cpu")
    trees = [DraftTree(torch.zeros(len(parents)), parents) for parents in trees_of(requests, most)]
    caches = [KVCache(3, kv, further + 1400 + 16 * n, width, dtype, torch.device("cuda")) for n in range(requests)]
    for number, cache in enumerate(caches):
        for tensor in cache.stores[0]:
            tensor.copy_(rows(*tensor.shape, dtype=dtype, seed=number))
    passes = [
        Pass(None, cache, tree.tokens, depths_of(tree.parents), tree.mask, further + base, 0)
        for tree, cache, base in zip(trees, caches, BASES, strict=False)
    ]
    shape, anchor = Shape.of(passes), rows(8, dtype=dtype, seed=0)
    layout = layout_of(shape, passes, frame_of(shape, [*map(len, passes)], count // kv, torch.device("cuda")))
    where = torch.tensor(addresses(caches, anchor, shape.requests), device=cpu).view(-1, 3)
    bases = torch.tensor([one.base for one in passes] + [0] * (shape.requests - requests))
    contexts = Contexts(anchor, torch.cat([where, bases[:, None]], 1).cuda(), layout, shape.longest, kv)
    parts = torch.randn(
        2, shape.rows, (count + 2 * kv) * width, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    turns = [rows(shape.rows, width // 2, dtype=dtype, seed=n) for n in (2, 3)]
    before = [[tensor.clone() for tensor in cache.stores[0]] for cache in caches]
    q = kernels.rope_many(parts, (), *turns, contexts, layer, count)
    found, end = kernels.path_attention_many(q, contexts, layer, 0.1), 0
    assert not found[sum(map(len, passes)) :].any()  # padding
    for one, old, tree in zip(passes, before, trees, strict=True):
        start, end = end, end + len(one)
        mine, base = slice(start, end), torch.tensor([one.base], device="cuda")
        own = [parts[:, mine].contiguous(), (), *(turn[mine].contiguous() for turn in turns)]
        right = kernels.rope(*own, old[0][layer, 0], old[1][layer, 0], base, 0, count)
        assert torch.equal(q[mine], right)
        assert all(torch.equal(new, was) for new, was in zip(one.cache.stores[0], old, strict=True))  # no other slot changed
        tables = torch.tensor(tree.depths, device="cuda"), layout.ways_QP[mine].contiguous()
        both = (tensor[layer, 0] for tensor in old)
        assert torch.equal(found[mine], kernels.path_attention(right, *both, base, *tables, 0.1))


def samples_of(target, count: int):
    """Make prompts of unlike lengths."""
    from specvlm.strategies.datasets.synthetic import SyntheticDataset
    from specvlm.video.video import probe, read_video

    for number, sample in enumerate(SyntheticDataset(scenes=count).samples()):
        clip = sample.video()
        question = sample.question if number % 2 else f"{sample.question} {sample.question}"
        yield target.prompt(question, [read_video(clip, **target.sampling(probe(clip)))])


RULES = [GreedyVerifier(), CoupledVerifier(0.8, top_p=0.95), SamplingVerifier(1.0)]
DRAFTERS = [TreeDrafter(), TreeDrafter("chain:5"), DynamicTreeDrafter(nodes=12), SelfDrafter("2x2"), PromptLookupDrafter()]


def broken(work, passes: int):
    """Run a request, but let it fail after some passes and steps."""
    rows = None
    for _ in range(passes):
        rows = yield work.send(rows)
    raise ArithmeticError


@pytest.mark.parametrize("seed", range(17))  # with the families 51 schedules
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_unlike_requests_answer_as_alone_in_bfloat16(family, seed):
    """They join between rounds, one is cancelled, one fails, some decode without a drafter; the target's pass is shared."""
    chance, engine = random.Random(seed), engine_for("graphs", "cuda")
    target, draft = (load(model_folder(f"embedded:{family}/{which}"), "bfloat16", "cuda") for which in ("target", "plain"))
    makers = []
    for number, prompt in enumerate(samples_of(target, 7)):
        rule = RULES[0] if number < 3 else chance.choice(RULES)
        options = GenerationOptions(chance.randint(8, 40), ratio=chance.choice([0.5, 0.9, 1.0]), seed=number)
        pruner, drafter = chance.choice([TwoStagePruner(), UniformPruner()]), chance.choice(DRAFTERS)
        graph = DecodingGraph(target, draft, pruner, drafter, rule, engine=engine)
        if number % 4 == 3:
            caches = graph.caches
            makers.append(lambda p=prompt, o=options, r=rule, c=caches: autoregressive_work(target, p, o, r, c, engine))
        else:
            makers.append(lambda p=prompt, o=options, g=graph: g.work(p, o))
    right = [tokens_of(list(alone(engine, make()))) for make in makers]
    whole, fails = makers[4], chance.randint(2, 12)
    makers[4] = lambda: broken(whole(), fails)
    scheduler, found, tickets = Scheduler(engine, stall_s=inf), {n: [] for n in range(len(makers))}, {}
    arrivals = {number: chance.randint(0, 6) for number in found}
    for turn in range(400):
        for number, at in arrivals.items():
            if at == turn:
                tickets[number] = scheduler.submit(makers[number]())
        scheduler.turn()
        if turn == 9:
            scheduler.cancel(tickets[2])
        for number, ticket in tickets.items():
            assert ticket.error is None or (number == 4 and isinstance(ticket.error, ArithmeticError)), ticket.error
            while ticket.steps:
                found[number] += ticket.steps.popleft().tokens
        if len(tickets) == len(makers) and not scheduler.live:
            break
    assert scheduler.run < scheduler.asked
    for number, tokens in found.items():
        assert tokens == right[number][: len(tokens)] and (number in (2, 4) or len(tokens) == len(right[number])), number


def greedy_graphs(engine, *drafters):
    target, draft = (load(model_folder(f"embedded:qwen2_5_vl/{which}"), "bfloat16", "cuda") for which in ("target", "plain"))
    options = GenerationOptions(24, ratio=0.5)
    graphs = [DecodingGraph(target, draft, UniformPruner(), one, RULES[0], options, engine=engine) for one in drafters]
    return graphs, list(samples_of(target, len(drafters)))


def joined(engine, graphs, prompts):
    scheduler = Scheduler(engine, stall_s=inf)
    tickets = [scheduler.submit(graph.work(prompt)) for graph, prompt in zip(graphs, prompts, strict=True)]
    return [list(scheduler.steps(ticket)) for ticket in tickets]


def test_threads_with_schedulers_of_their_own_answer_as_alone():
    engine, found = engine_for("graphs", "cuda"), {}
    graphs, prompts = greedy_graphs(engine, *[TreeDrafter()] * 6)
    right = [tokens_of(list(graph.decode(prompt))) for graph, prompt in zip(graphs, prompts, strict=True)]

    def run(number: int, own: slice) -> None:
        torch.cuda.set_device(0)
        found[number] = [[*map(tokens_of, joined(engine, graphs[own], prompts[own]))] for _ in range(3)]

    halves = slice(0, 3), slice(3, 6)
    joined(engine, graphs[:3], prompts[:3])  # captures are made by one thread
    threads = [Thread(target=run, args=pair) for pair in enumerate(halves)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(2)] == [[right[own]] * 3 for own in halves]


def test_drafts_that_were_captured_together_outlive_the_tables_of_their_sessions():
    engine = engine_for("graphs", "cuda")
    graphs, prompts = greedy_graphs(engine, *[TreeDrafter()] * 3)
    first = joined(engine, graphs, prompts)
    assert any(key[0] == "drafts" for key in engine._programs)
    tables_of.cache_clear()
    gc.collect()
    junk = [torch.full((64,), 2**40, device="cuda") for _ in range(20_000)]  # over whatever was freed
    again = joined(engine, graphs, prompts)
    del junk
    assert [[step.tokens for step in steps] for steps in again] == [[step.tokens for step in steps] for steps in first]


@dataclass(frozen=True)
class Malformed(GreedyVerifier):
    """A plugin's rule that returns a number too many."""

    name = "malformed"

    def decide(self, ctx):
        return super().decide(ctx).repeat(2)[:3]


def test_a_decision_of_the_wrong_shape_costs_its_own_request_alone():
    engine = engine_for("graphs", "cuda")
    graphs, prompts = greedy_graphs(engine, *[TreeDrafter()] * 3)
    right = [tokens_of(list(graph.decode(prompt))) for graph, prompt in zip(graphs, prompts, strict=True)]
    scheduler = Scheduler(engine, stall_s=inf)
    graphs[0] = replace(graphs[0], verifier=Malformed())
    bad, *good = [scheduler.submit(graph.work(prompt)) for graph, prompt in zip(graphs, prompts, strict=True)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in good] == right[1:]
    with pytest.raises(ValueError, match="integers"):
        list(scheduler.steps(bad))
