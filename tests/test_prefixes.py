"""A request that finds a beginning of its prompt has the tokens, the kept video tokens and the signals of one that does not."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field, replace

import pytest
import tiny
import torch
from covering import sampled
from curious import ALL, Curious

from specvlm.decoding.loop import DecodingGraph, autoregressive_work
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.scheduler import Scheduler, alone
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, VideoPrompt

PLENTY = 2**30
ENGINES = {"eager": Engine, "exact": lambda: GraphsEngine("direct")}


@pytest.fixture
def exact(monkeypatch):
    """Treat the arithmetic of plain operations, which a GPU's kernels replace, as exact, in slices of few rows."""
    monkeypatch.setattr(GraphsEngine, "exact", lambda engine, model: True)
    monkeypatch.setattr("specvlm.engine.exact_prefill.ROWS", 4)


def graph_of(family, pruner=None, engine=None, drafter=None, verifier=None, store=None, dtype=torch.float64) -> DecodingGraph:
    models = tiny.model(family, dtype=dtype), tiny.draft_of(family, dtype=dtype)
    strategies = (pruner or UniformPruner(), drafter or TreeDrafter("2x1"), verifier or GreedyVerifier())
    graph = DecodingGraph(*models, *strategies, GenerationOptions(8, 0.5), engine=engine or Engine())
    graph.prefixes = store
    return graph


def asking(prompt: VideoPrompt, *words: int, behind: int = 0) -> VideoPrompt:
    """Replace the text from the slot `behind` the last video on."""
    return replace(prompt, tokens=torch.cat([prompt.tokens[: prompt.cut + behind], torch.tensor(words)]))


def turn(prompt: VideoPrompt, answer: list[int], *words: int) -> VideoPrompt:
    """Continue a chat. Tokens of an answer that stand for a video would need one."""
    return asking(prompt, *prompt.tokens[prompt.cut :].tolist(), *(token if token < 80 else 7 for token in answer), *words)


def without(graph: DecodingGraph, prompt: VideoPrompt) -> list[int]:
    return tokens_of(list(alone(graph.engine, replace_store(graph, None).work(prompt))))


def replace_store(graph: DecodingGraph, store: PrefixStore | None) -> DecodingGraph:
    other = copy.copy(graph)
    other.prefixes = store
    return other


@dataclass(frozen=True)
class Seeing(Curious):
    """Notes the signals of each request."""

    name = "seeing"
    seen: list = field(default_factory=list, compare=False)

    def select(self, ctx):
        self.seen.append({name: ctx.signal(name).clone() for name in ALL})
        for name in ALL:
            ctx.signal(name).zero_()  # what a strategy writes must not reach another request
        return super().select(ctx)


@pytest.mark.parametrize(
    ("pruner", "engine", "family"),
    sampled([UniformPruner(), TwoStagePruner(), NonePruner()], list(ENGINES), tiny.FAMILIES),
    ids=lambda of: getattr(of, "name", of),
)
def test_every_way_to_go_on_from_a_known_prompt_gives_what_it_gives_alone(family, pruner, engine, exact):
    graph = graph_of(family, pruner, ENGINES[engine](), store=PrefixStore(PLENTY))
    prompt = tiny.prompt(family)
    answer, cut, size = without(graph, prompt), prompt.cut, len(prompt)
    chat = turn(prompt, answer, 20, 21, 22)
    ways = {
        "first": (prompt, 0),
        "again": (prompt, size),
        "another question of the same length": (asking(prompt, *range(30, 30 + size - cut)), cut),
        "another question": (asking(prompt, 40, 41), cut),
        "longer": (asking(prompt, 50, behind=size - cut - 2), size - 2),
        "the next turn": (chat, None),
        "an edited turn": (asking(chat, 60, 61, behind=4), cut + 4),
        "another video": (tiny.prompt(family, seed=1), 0),
    }
    reads = graph.pruner.needs  # then all text behind the video is run again
    for way, (request, known) in ways.items():
        steps = list(graph.decode(request))
        assert tokens_of(steps) == without(graph, request), way
        found = steps[0].reused.tokens
        if known is None:
            assert found == cut if reads else found >= size, way
        else:
            assert found == (min(known, cut) if reads and way != "again" else known), way
        kept = next((step.keep.index.tolist() for step in steps if step.keep), None)
        assert kept == next(step.keep.index.tolist() for step in replace_store(graph, None).decode(request) if step.keep), way
    assert graph.prefixes.hits == len(ways) - 2 and graph.prefixes.misses == 2 and not graph.prefixes._claims


@pytest.mark.parametrize(("engine", "videos", "family"), sampled(list(ENGINES), [1, 2], tiny.FAMILIES))
def test_signals_of_a_hit_are_those_of_a_miss(family, videos, engine, exact):
    pruner = Seeing()
    graph = graph_of(family, pruner, ENGINES[engine](), store=PrefixStore(PLENTY))
    prompt = tiny.prompt(family, videos=videos, images=1)
    asked = [prompt, asking(prompt, 30, 31, 32), prompt, turn(prompt, [9, 8, 7], 20)]
    for request in asked:
        list(graph.decode(request))
        list(replace_store(graph, None).decode(request))
    hits, misses = pruner.seen[::2], pruner.seen[1::2]
    for hit, miss in zip(hits, misses, strict=True):
        for name in ALL:
            torch.testing.assert_close(hit[name], miss[name], rtol=1e-9, atol=1e-9, msg=name)
    assert graph.prefixes.hits == 3


def test_a_request_that_needs_a_record_of_the_video_that_none_made_computes_its_rows_again():
    graph = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY))
    curious = graph_of("qwen2_5_vl", Curious(), store=graph.prefixes)
    prompt = tiny.prompt("qwen2_5_vl")
    other, third = asking(prompt, 30, 31), asking(prompt, 32, 33)
    asked = ((graph, prompt, 0), (curious, other, 0), (curious, third, prompt.cut), (graph, other, len(other) - 1))
    for one, request, known in asked:
        steps = list(one.decode(request))
        assert steps[0].reused.tokens == known and tokens_of(steps) == without(one, request)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_chat_that_gets_a_second_video_reads_the_first_one_once(family, monkeypatch):
    graph = graph_of(family, store=PrefixStore(PLENTY))
    both = tiny.prompt(family, videos=2)
    first_end = both.joints[0]
    tokens, size = torch.cat([both.tokens[:first_end], torch.tensor([30, 31])]), len(both.grids[0])
    first = VideoPrompt(tokens, both.video_index[:size], both.grids[:1], both.videos[:1])
    list(graph.decode(first))
    encoded = []
    encode = type(graph.target).encode_video
    monkeypatch.setattr(type(graph.target), "encode_video", lambda lm, *more: encoded.append(lm) or encode(lm, *more))
    steps = list(graph.decode(both))
    assert steps[0].reused.tokens == first_end and [lm for lm in encoded if lm is graph.target] == [graph.target]
    assert tokens_of(steps) == without(graph, both)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_changed_pixel_is_another_video(family):
    graph = graph_of(family, store=PrefixStore(PLENTY))
    prompt = tiny.prompt(family)
    list(graph.decode(prompt))
    pixels = prompt.videos[0]["pixels"].clone()
    pixels.view(-1)[7] += 1
    other = replace(prompt, videos=({**prompt.videos[0], "pixels": pixels},))
    steps = list(graph.decode(other))
    assert steps[0].reused.tokens == 0 and tokens_of(steps) == without(graph, other)


def test_models_engines_and_positions_are_told_apart():
    store, prompt = PrefixStore(PLENTY), tiny.prompt("qwen2_5_vl")
    graphs = [graph_of("qwen2_5_vl", store=store), graph_of("qwen2_5_vl", engine=GraphsEngine("direct"), store=store)]
    noisy = graph_of("qwen2_5_vl", store=store)
    noisy.target = tiny.draft_of("qwen2_5_vl")
    reference = graph_of("qwen2_5_vl", store=store)
    reference.target = VideoLM.__new__(type(noisy.target))
    reference.target.__dict__ |= noisy.target.__dict__ | {"mrope": "reference"}
    for graph in (*graphs, noisy, reference):
        steps = list(graph.decode(prompt))
        assert steps[0].reused.tokens == 0 and tokens_of(steps) == without(graph, prompt)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_requests_with_one_prompt_prefill_once_and_have_the_tokens_of_each_alone(family, monkeypatch):
    prompt, filled = tiny.prompt(family), []
    prefilling = Engine.prefilling
    monkeypatch.setattr(Engine, "prefilling", lambda *args: filled.append(args[1]) or prefilling(*args))
    graph = graph_of(family, TwoStagePruner(), verifier=CoupledVerifier(1.0))
    every = [GenerationOptions(limit, 0.5, seed=seed) for seed, limit in enumerate((1, 12, 7, 12))]
    want = [tokens_of(list(graph.decode(prompt, options))) for options in every]
    assert len(filled) == 4
    scheduler, store = Scheduler(graph.engine), PrefixStore(PLENTY)
    tickets = [scheduler.submit(graph.work(prompt, options, store)) for options in every]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == want
    assert len(filled) == 5 and not graph.caches._leased


@pytest.mark.parametrize("cancelled", [False, True])
def test_requests_that_run_at_the_same_time_read_their_video_once_even_if_the_first_is_cancelled(cancelled, monkeypatch):
    graph = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY))
    prompt = tiny.prompt("qwen2_5_vl")
    asked = [asking(prompt, 30 + number, 31) for number in range(3)]
    want = [without(graph, request) for request in asked]
    encoded = []
    encode = type(graph.target).encode_video
    monkeypatch.setattr(type(graph.target), "encode_video", lambda lm, *more: encoded.append(lm) or encode(lm, *more))
    scheduler = Scheduler(graph.engine)
    tickets = [scheduler.submit(graph.work(request)) for request in asked]
    scheduler.turn()
    if cancelled:
        scheduler.cancel(tickets[0])
    found = [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets[cancelled:]]
    assert found == want[cancelled:] and not graph.prefixes._claims
    assert 1 <= sum(lm is graph.target for lm in encoded) <= 1 + cancelled
    assert all(item.users == 0 for item in graph.prefixes.shelf.items)


def test_a_request_does_not_wait_for_ever_for_one_that_rests(monkeypatch):
    monkeypatch.setattr("specvlm.decoding.prefixes.STALE_S", 0.05)
    graph = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY))
    prompt = tiny.prompt("qwen2_5_vl")
    resting = graph.work(prompt)
    with torch.inference_mode():
        next(resting)  # computes, and is never asked again
        assert tokens_of(list(graph.decode(prompt))) == without(graph, prompt)
        resting.close()
    assert not graph.prefixes._claims


def test_a_budget_is_kept_by_dropping_what_was_used_least_recently():
    prompts = [tiny.prompt("qwen2_5_vl", seed=number) for number in range(4)]
    graph = graph_of("qwen2_5_vl", drafter=PromptLookupDrafter(), store=PrefixStore(PLENTY))
    list(graph.decode(prompts[0]))
    size = graph.prefixes.shelf.nbytes()
    graph.prefixes = PrefixStore(int(2.5 * size))
    order = [0, 1, 0, 2, 0, 1, 3, 3]
    found = []
    for number in order:
        steps = list(graph.decode(prompts[number]))
        assert tokens_of(steps) == without(graph, prompts[number])
        assert graph.prefixes.shelf.nbytes() <= graph.prefixes.shelf.device_bytes
        assert all(item.parent is None or item.parent in graph.prefixes.shelf.items for item in graph.prefixes.shelf.items)
        found.append(steps[0].reused.tokens > 0)
    assert found == [False, False, True, False, True, False, False, True]


def test_a_store_that_is_too_small_keeps_nothing_and_changes_nothing():
    graph, prompt = graph_of("qwen2_5_vl", store=PrefixStore(1000)), tiny.prompt("qwen2_5_vl")
    for _ in range(2):
        steps = list(graph.decode(prompt))
        assert steps[0].reused.tokens == 0 and tokens_of(steps) == without(graph, prompt)
    assert not graph.prefixes.shelf.items


@pytest.mark.parametrize("damage", [None, "changed", "truncated", "of another type"])
def test_rows_come_back_from_host_memory_unless_they_were_damaged_there(damage):
    prompt, other = (tiny.prompt("qwen2_5_vl", seed=seed) for seed in (0, 1))
    graph = graph_of("qwen2_5_vl", drafter=PromptLookupDrafter(), store=PrefixStore(PLENTY))
    list(graph.decode(prompt))
    shelf = graph.prefixes.shelf
    shelf.device_bytes, shelf.host_bytes = int(1.1 * shelf.nbytes()), PLENTY
    list(graph.decode(other))
    moved = [item for item in shelf.items if item.kept.on_host]
    assert moved and shelf.nbytes() <= shelf.device_bytes
    ways = {"changed": lambda x: x.clone() + 1e-9, "truncated": lambda x: x[..., :-1], "of another type": lambda x: x.float()}
    for item in moved if damage else ():
        first, *rest = item.kept._tensors
        item.kept._tensors = (ways[damage](first), *rest)
    steps = list(graph.decode(prompt))
    assert tokens_of(steps) == without(graph, prompt)
    assert bool(steps[0].reused.tokens) == (damage is None) and bool(shelf.damaged) == (damage is not None)


def test_the_target_alone_may_use_what_requests_with_a_drafter_left():
    graph, prompt = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY)), tiny.prompt("qwen2_5_vl")
    want = tokens_of(list(graph.decode(prompt)))
    work = autoregressive_work(graph.target, prompt, 8, GreedyVerifier(), CachePool(), graph.engine, graph.prefixes)
    steps = list(alone(graph.engine, work))
    assert tokens_of(steps) == want and steps[0].reused.tokens == len(prompt)


def test_a_dropped_store_leaves_no_tensor_behind():
    graph, prompt = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY)), tiny.prompt("qwen2_5_vl")
    list(graph.decode(prompt))
    assert graph.prefixes.shelf.items
    graph.prefixes.empty()
    gc.collect()
    assert not graph.prefixes.shelf.items and not graph.prefixes._videos and not graph.prefixes._others
    assert next(graph.decode(prompt)).reused.tokens == 0


def test_a_frozen_store_is_read_and_not_added_to_even_if_a_warm_up_is_given_up():
    graph, prompt = graph_of("qwen2_5_vl", store=PrefixStore(PLENTY)), tiny.prompt("qwen2_5_vl")
    store = graph.prefixes

    def frozen():
        with store.frozen():
            yield from graph.decode(prompt)

    with store.frozen():
        given_up = frozen()
        next(given_up)
    assert not store.keeps
    del given_up
    gc.collect()
    assert store.keeps and not store.shelf.items
    list(graph.decode(prompt))
    with store.frozen():
        assert next(graph.decode(asking(prompt, 30, 31))).reused.tokens == prompt.cut
    assert store.keeps
