"""A draft on a GPU of its own starts beside the target's prefill: the same tokens, rounds and choices as after it.

There is no GPU here: `has_own_gpu` is made to say that there is one, so that what would run beside runs in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import packages
import pytest
import tiny
import torch
from covering import covering
from family_checks import all_pruners

from specvlm.decoding import early_start
from specvlm.decoding.collect import layers_read
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.decoding.scheduler import Scheduler
from specvlm.decoding.selection import Selection
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import UserError
from specvlm.models.partition import Stage
from specvlm.models.placement import apart
from specvlm.models.side_stream import Mark, SideStream
from specvlm.models.text_passes import TextPasses
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import DraftContext, Drafter, Pruner
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, KeepSet, Step

LAYERS = 3  # of a tiny model
VERIFIERS = (GreedyVerifier(), CoupledVerifier(0.8, top_k=20), SamplingVerifier(0.8, top_k=20))
DRAFTERS = (TreeDrafter("chain:3"), TreeDrafter("3x2x1"), OverlapDrafter("chain:3", ahead=2), DynamicTreeDrafter())
(UV_PRUNE,) = (pruner for pruner in packages.strategies(Pruner) if pruner.name == "uv_prune")
(SPARSE,) = (type(pruner)((0, 1), (2.0, 1.0)) for pruner in packages.strategies(Pruner) if pruner.name == "sparsevlm")
EARLY = (UniformPruner(), RandomPruner(), FastVPruner(1), FastVPruner(2), FastVPruner(1, "draft"), UV_PRUNE, SPARSE)


@cache
def pair(family: str) -> tuple[VideoLM, VideoLM]:
    return tiny.model(family, dtype=torch.float32), tiny.draft_of(family, dtype=torch.float32)


def passed(name: str, rows: int, first: int = 1, last: int = LAYERS) -> list[str]:
    return [f"{name} {rows} rows, layer {layer}" for layer in range(first, last + 1)]


@dataclass(frozen=True)
class SightPruner(Pruner):
    """A pruner that reads the target's vision tower."""

    name = "sight"
    needs = frozenset({"vision_attention", "features"})

    def select(self, ctx):
        return KeepSet.top(ctx.signal("vision_attention") + ctx.features.norm(dim=1), ctx.budget)


def graph_of(family: str, pruner: Pruner, drafter: Drafter = DRAFTERS[0], verifier=VERIFIERS[0], **more: Any) -> DecodingGraph:
    ratio = more.pop("ratio", 0.6)
    return DecodingGraph(*pair(family), pruner, drafter, verifier, GenerationOptions(ratio=ratio, seed=3), **more)


def rounds_of(steps: list[Step]) -> list[Any]:
    trees = [(step.tree.tokens.tolist(), step.verdict.path, step.verdict.bonus) for step in steps if step.tree is not None]
    return [tokens_of(steps), trees, [step.keep.index.tolist() for step in steps if step.keep is not None]]


@pytest.fixture
def own_gpu(monkeypatch) -> None:
    monkeypatch.setattr(early_start, "has_own_gpu", lambda draft, target: True)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """Note what runs, in order."""
    found, layers, encode, select = [], TextPasses._layers, VideoLM.features, Selection.select
    names = {id(lm.hf): name for family in tiny.FAMILIES for lm, name in zip(pair(family), ("target", "draft"), strict=True)}

    def noted(self, embeds, *rest) -> Iterator[Any]:
        passing = layers(self, embeds, *rest)
        while True:
            try:
                pause = next(passing)
            except StopIteration as end:
                return end.value
            if len(embeds) > 1:
                found.append(f"{names[id(self.hf)]} {len(embeds)} rows, layer {pause.layer}")
            yield pause

    def noting(what, function):
        def run(self, *given, **more):
            found.append(what)
            return function(self, *given, **more)

        return run

    monkeypatch.setattr(TextPasses, "_layers", noted)
    monkeypatch.setattr(VideoLM, "features", noting("tower", encode))
    monkeypatch.setattr(Selection, "select", noting("select", select))
    return found


def ran(graph: DecodingGraph, log: list[str], prompt) -> list[str]:
    """Decode up to the first round, and return what ran, with "token" where the first token is there."""
    del log[:]
    steps = graph.decode(prompt, 8)
    next(steps)
    log.append("token")
    next(steps)
    steps.close()
    return log


# --- what the output is -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pruner", "drafter", "verifier", "backend"),
    covering(
        tiny.FAMILIES, (*EARLY, SightPruner(), TwoStagePruner(), NonePruner()), DRAFTERS, VERIFIERS, (None, "direct", "exact")
    ),
    ids=str,
)
def test_rounds_are_those_of_a_draft_that_starts_afterwards(family, pruner, drafter, verifier, backend, monkeypatch):
    given = (family, pruner, drafter, verifier)
    if backend == "exact":  # as with a GPU's kernels: the text behind the video runs apart
        monkeypatch.setattr(GraphsEngine, "exact", lambda engine, model: True)
        monkeypatch.setattr("specvlm.engine.exact_prefill.ROWS", 4)
    more = {"engine": Engine() if backend is None else GraphsEngine("direct")}
    videos = 1 + (pruner.name == "fastv")
    want = rounds_of(list(graph_of(*given, **more).decode(tiny.prompt(family, videos=videos, images=1), 24)))
    monkeypatch.setattr(early_start, "has_own_gpu", lambda draft, target: True)
    found = rounds_of(list(graph_of(*given, **more).decode(tiny.prompt(family, videos=videos, images=1), 24)))
    assert found == want and len(want[1]) > 2 and len(want[2]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("ratio", [0.9, 0.3])
def test_every_pruner_keeps_the_same_tokens(family, ratio, monkeypatch):
    prompt, early = tiny.prompt(family, frames=5), 0
    for pruner in all_pruners():
        want, found = [], []
        for own, into in ((False, want), (True, found)):
            monkeypatch.setattr(early_start, "has_own_gpu", lambda draft, target, own=own: own)
            into += rounds_of(list(graph_of(family, pruner, ratio=ratio).decode(prompt, 6)))
        assert found == want, pruner
        early += layers_read(pruner, pair(family)[0]) < LAYERS
    assert early >= 15


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_or_nothing_is_kept_without_a_pruner(ratio, own_gpu, log):
    graph, prompt = graph_of("qwen2_5_vl", TwoStagePruner(), ratio=ratio), tiny.prompt("qwen2_5_vl")
    found = ran(graph, log, prompt)
    assert found.index("select") < found.index("token") and found.index(passed("draft", found_rows(prompt, ratio))[0]) > 0
    assert tokens_of(list(graph.decode(prompt, 12))) == tiny.hf_greedy(graph.target, prompt, 12)


def found_rows(prompt, ratio: float) -> int:
    return len(prompt) - len(prompt.video_index) + KeepSet.budget(len(prompt.video_index), ratio)


# --- in which order it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("pruner", EARLY, ids=str)
def test_an_early_pruner_lets_the_draft_be_ready_with_the_first_token(family, pruner, own_gpu, log):
    prompt = tiny.prompt(family)
    video, text, kept = prompt.cut, len(prompt) - prompt.cut, found_rows(prompt, 0.6)
    layers = layers_read(pruner, pair(family)[0])
    choice = ["select", "tower"] if not pruner.needs else ["tower", "select"]
    assert ran(graph_of(family, pruner), log, prompt)[: log.index("token") + 1] == [
        *passed("target", video, last=layers),
        *(passed("target", text, last=layers)),
        *passed("target", video, first=layers + 1),
        *choice,
        *passed("draft", kept),
        *passed("target", text),
        "token",
    ]
    assert not [item for item in log[log.index("token") :] if "tower" in item or item == "select" or f" {kept} rows" in item]


@pytest.mark.parametrize(
    ("pruner", "waits"),
    [(UniformPruner(), None), (FastVPruner(1), passed("target", 10, last=1)[0]), (SightPruner(), "target's tower")],
    ids=str,
)
def test_a_choice_waits_for_its_signals_and_not_for_what_is_queued_behind_them(pruner, waits, own_gpu, log, monkeypatch):
    """A mark stands behind what was queued last when it was made."""

    class FakeMark(Mark):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.behind = log[-1] if log else "target's tower"

    class FakeStream(SideStream):
        @contextmanager
        def after(self, mark):
            log.append(f"behind {None if mark is None else mark.behind}")
            yield

    monkeypatch.setattr(early_start, "Mark", FakeMark)
    monkeypatch.setattr(early_start, "SideStream", FakeStream)
    found = ran(graph_of("qwen2_5_vl", pruner), log, tiny.prompt("qwen2_5_vl"))
    assert [item for item in found if item.startswith("behind")] == [f"behind {waits}"]
    assert found[found.index(f"behind {waits}") + 1] == "select" and found.index("select") < found.index("token")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruner_of_late_signals_lets_the_draft_see_the_video_early(family, own_gpu, log):
    prompt = tiny.prompt(family)
    video, text, kept = prompt.cut, len(prompt) - prompt.cut, found_rows(prompt, 0.6)
    assert ran(graph_of(family, TwoStagePruner()), log, prompt)[: 3 * LAYERS + 3] == [
        *passed("target", video),
        "tower",
        *passed("target", text),
        "token",
        "select",
        *passed("draft", kept),
    ]


@pytest.mark.parametrize("pruner", [UniformPruner(), FastVPruner(1), TwoStagePruner()], ids=str)
def test_on_the_targets_device_the_draft_starts_afterwards(pruner, log):
    prompt = tiny.prompt("qwen2_5_vl")
    found = ran(graph_of("qwen2_5_vl", pruner), log, prompt)
    want = [*passed("target", prompt.cut), *passed("target", len(prompt) - prompt.cut), "token", "select", "tower"]
    assert found[: len(want)] == want


@pytest.mark.parametrize("pruner", [UniformPruner(), FastVPruner(1), TwoStagePruner()], ids=str)
@pytest.mark.parametrize("looks", [0, 1, 2, 3])
def test_the_target_never_waits_for_the_draft(pruner, looks, monkeypatch, own_gpu, log):
    """Once the target has nothing queued any more, the rest of the draft's start comes after the first token."""
    prompt, graph = tiny.prompt("qwen2_5_vl"), graph_of("qwen2_5_vl", pruner)
    want = rounds_of(list(graph.decode(prompt, 12)))
    left = [looks]

    def has_passed(mark: Mark) -> bool:
        left[0] -= 1
        return left[0] < 0

    monkeypatch.setattr(Mark, "passed", property(has_passed))
    found = ran(graph, log, prompt)
    steps = {"uniform": "select tower draft", "fastv": "tower select draft", "two_stage": "tower"}[pruner.name].split()
    before = [item for item in found[: found.index("token")] if not item.startswith("target")]
    assert len({word for word in steps if any(word in item for item in before)}) == min(looks, len(steps))
    left[0] = looks
    assert rounds_of(list(graph.decode(prompt, 12))) == want


# --- ends -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failing(UniformPruner):
    """A pruner that fails."""

    def select(self, ctx):
        raise RuntimeError("no choice")


@pytest.mark.parametrize("pruner", [UniformPruner(), FastVPruner(1), TwoStagePruner()], ids=str)
def test_a_request_that_is_cancelled_during_its_prefill_gives_all_caches_back(pruner, own_gpu):
    graph, prompt, pauses = graph_of("qwen2_5_vl", pruner), tiny.prompt("qwen2_5_vl"), 0
    while True:
        with torch.inference_mode():
            work = graph.work(prompt, 8)
            item = next(work)
            for _ in range(pauses):
                item = next(work)
            work.close()
        assert not graph.caches._leased
        if isinstance(item, Step):
            break
        pauses += 1
    assert pauses >= 2 * LAYERS
    assert tokens_of(list(graph.decode(prompt, 12))) == tiny.hf_greedy(graph.target, prompt, 12)


@pytest.mark.parametrize("place", ["select", "features", "fill"])
def test_a_failure_of_the_start_ends_the_request_and_frees_its_caches(place, own_gpu, monkeypatch):
    pruner, (_, draft) = Failing() if place == "select" else UniformPruner(), pair("qwen2_5_vl")

    def fails(*_, **__):
        raise RuntimeError("no choice")

    if place != "select":
        monkeypatch.setattr(draft, "features" if place == "features" else "prefill", fails, raising=False)
    graph = graph_of("qwen2_5_vl", pruner)
    with pytest.raises(RuntimeError, match="no choice") as told:
        list(graph.decode(tiny.prompt("qwen2_5_vl"), 8))
    assert not graph.caches._leased and (place != "select" or "in pruner=uniform" in told.value.__notes__)


@dataclass(frozen=True)
class OwnCacheDrafter(TreeDrafter):
    """A plugin's drafter that takes its cache itself, although its base class lets the loop fill one."""

    name = "own_cache"

    def start(self, ctx: DraftContext):
        ctx.caches.take("draft", ctx.draft, 10)
        return TreeDrafter("chain:2").start(DraftContext(**vars(ctx) | {"caches": Renamed(ctx.caches)}))


class Renamed(SimpleNamespace):
    def __init__(self, lease) -> None:
        super().__init__(lease=lease, _taken={})

    def take(self, role, model, slots):
        return self.lease.take(f"other {role}", model, slots)


def test_a_session_that_takes_a_cache_of_the_same_name_gets_one(own_gpu):
    graph, prompt = graph_of("qwen2_5_vl", TwoStagePruner(), OwnCacheDrafter("chain:2")), tiny.prompt("qwen2_5_vl")
    assert tokens_of(list(graph.decode(prompt, 12))) == tiny.hf_greedy(graph.target, prompt, 12)
    assert not graph.caches._leased


# --- beside other requests, and behind kept prompts -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("backend", [None, "direct"])
def test_several_requests_have_the_tokens_of_each_alone(family, backend, own_gpu):
    engine = Engine() if backend is None else GraphsEngine(backend)
    pruners = (UniformPruner(), FastVPruner(1), TwoStagePruner(), UV_PRUNE)
    graphs = [graph_of(family, pruner, drafter, engine=engine) for pruner, drafter in zip(pruners, DRAFTERS, strict=True)]
    prompts = [tiny.prompt(family, seed=number, frames=3 + number) for number in range(4)]
    want = [tiny.hf_greedy(graph.target, prompt, 14) for graph, prompt in zip(graphs, prompts, strict=True)]
    scheduler = Scheduler(engine)
    tickets = [scheduler.submit(graph.work(prompt, 14)) for graph, prompt in zip(graphs, prompts, strict=True)]
    assert [tokens_of(list(scheduler.steps(ticket))) for ticket in tickets] == want
    assert not any(graph.caches._leased for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pruner", "verifier"),
    covering(tiny.FAMILIES, (UniformPruner(), FastVPruner(1), TwoStagePruner(), UV_PRUNE), VERIFIERS),
    ids=str,
)
def test_kept_prompts_give_the_same_rounds(family, pruner, verifier, own_gpu, log):
    prompt, store = tiny.prompt(family), PrefixStore(2**26)
    graph = graph_of(family, pruner, verifier=verifier)
    want = rounds_of(list(graph.decode(prompt, 10)))
    graph.prefixes = store
    for known in (False, True):
        del log[:]
        assert rounds_of(list(graph.decode(prompt, 10))) == want
        assert store.hits == known
    assert not [item for item in log if item.startswith("target") and f" {prompt.cut} rows" in item]


@dataclass(frozen=True)
class NotedFastV(FastVPruner):
    """FastV, which notes the signals that it reads."""

    seen: list = field(default_factory=list, compare=False)

    def select(self, ctx):
        self.seen.append(ctx.signal("verifier_attention_last_row").clone())
        return super().select(ctx)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_where_guesses_change_a_sample_a_choice_reads_the_bits_that_it_reads_of_a_known_video(
    family, verifier, own_gpu, log, monkeypatch
):
    """An exact engine computes the text's own rows in another way than the modules, in which it runs ahead."""
    monkeypatch.setattr(GraphsEngine, "exact", lambda engine, model: True)
    pruner, prompt = NotedFastV(2), tiny.prompt(family)
    graph = graph_of(family, pruner, verifier=verifier, engine=GraphsEngine("direct"), prefixes=PrefixStore(2**26))
    beside = "select" in ran(graph, log, prompt)[: log.index("token")]
    list(graph.decode(prompt, 8))
    miss, hit = pruner.seen
    assert graph.prefixes.hits == 1 and beside is graph.joins
    assert torch.equal(miss, hit) or beside  # where no guess changes the output, they may be rounded otherwise


@pytest.mark.parametrize("pruner", [UniformPruner(), FastVPruner(1), TwoStagePruner()], ids=str)
def test_a_target_in_stages_has_only_what_needs_no_layers_of_it_started_early(pruner, own_gpu, log):
    family, cpu = "llava_onevision", torch.device("cpu")
    whole, _ = pair(family)
    target = type(whole)(whole.hf, whole.tokenizer, whole.folder, stages=(Stage(cpu, 0, 2), Stage(cpu, 2, LAYERS)))
    graph, prompt = graph_of(family, pruner), tiny.prompt(family)
    graph.target = target
    want = tiny.hf_greedy(whole, prompt, 8)
    steps = graph.decode(prompt, 8)
    first = next(steps)
    assert ("select" in log) == (not pruner.needs) and "tower" in log
    assert tokens_of([first, *steps]) == want


# --- rules ------------------------------------------------------------------------------------------------------------


def fake(*devices: str, ranks: int = 1) -> Any:
    stages = [SimpleNamespace(device=torch.device(device)) for device in devices]
    return SimpleNamespace(stages=stages, device=stages[0].device, ranks=SimpleNamespace(size=ranks))


def test_a_draft_has_a_gpu_of_its_own_unless_the_target_or_another_rank_uses_it():
    for draft, target, own, alone in [
        (fake("cuda:1"), fake("cuda:0"), True, True),
        (fake("cuda:2"), fake("cuda:0", "cuda:1"), True, True),
        (fake("cuda:1"), fake("cuda:0", "cuda:1"), False, False),
        (fake("cuda:0"), fake("cuda:0"), False, False),
        (fake("cpu"), fake("cuda:0"), True, False),  # its work would not run beside anything
        (fake("cuda:1", ranks=2), fake("cuda:0", ranks=2), False, False),
        (fake("cuda:2"), fake("cuda:0", ranks=2), True, False),  # ranks choose together
        (fake("meta"), fake("cuda:1", ranks=2), True, False),
    ]:
        assert (apart(draft, target), early_start.has_own_gpu(draft, target)) == (own, alone)


@pytest.mark.parametrize(
    ("pruner", "layers"),
    [
        (UniformPruner(), 0),
        (FastVPruner(1), 1),
        (FastVPruner(2), 2),
        (FastVPruner(9), LAYERS),
        (FastVPruner(2, "draft"), 0),
        (UV_PRUNE, 1),
        (SPARSE, 2),
        (TwoStagePruner(), LAYERS),
    ],
    ids=str,
)
def test_signals_tell_how_many_layers_they_come_from(pruner, layers):
    assert layers_read(pruner, pair("qwen2_5_vl")[0]) == layers


@dataclass(frozen=True)
class Deeper(FastVPruner):
    """A pruner that claims to read attention of more layers than there are."""

    def attention_layers(self, layers: int) -> int:
        return layers + 1


def test_layers_that_the_target_lacks_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"pruner=fastv reads attention of 4 layers, but the target has 3"):
        graph_of("qwen2_5_vl", Deeper())
