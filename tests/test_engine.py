"""The graphs engine on a CPU: its lean pass, and its programs run directly or as traced operations."""

from __future__ import annotations

import functools
from itertools import product, zip_longest
from time import perf_counter

import pytest
import tiny
import torch
from rounding import additions, assert_same_sums

from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine, Fallback, engine_for, exact_prefill
from specvlm.engine.base import tree_pass
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.lean import LeanText, Sight, run_pass, why_not
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.errors import UserError
from specvlm.models.quantize import quantize_text
from specvlm.results.metrics import acceptance_of, speed_of, tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, GenerationOptions, Step, TreeShape

DRAFTERS = {
    "tree": TreeDrafter(),
    "wide": TreeDrafter(shape="3x2"),
    "chain": TreeDrafter(shape="chain:4"),
    "self": SelfDrafter(),
    "prompt_lookup": PromptLookupDrafter(),
}


# Tracing takes long: each family once, one tree that branches and one that does not. Deeper ones are more of the same.
TRACED = [("qwen2_5_vl", "wide"), ("llava_onevision", "chain")]


def graph_of(family: str, drafter: str, engine: Engine, pruner=None, ratio: float = 0.5, verifier=None) -> DecodingGraph:
    return DecodingGraph(
        tiny.model(family),
        tiny.draft_of(family),
        pruner or UniformPruner(),
        DRAFTERS[drafter],
        verifier or GreedyVerifier(),
        GenerationOptions(ratio=ratio),
        engine=engine,
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", ["paper", "chain:3", "2x2x2"])
@torch.inference_mode()
def test_the_lean_pass_is_the_models_own(family, shape):
    lm, request = tiny.model(family), tiny.prompt(family)
    assert why_not(lm) is None
    parents = TreeShape.parse(shape).parents
    tree = DraftTree(torch.randint(5, 80, (len(parents),)), parents)
    ours, theirs = lm.new_cache(len(request) + 40), lm.new_cache(len(request) + 40)
    embeds = lm.embed(request, lm.features(request))
    for cache in (ours, theirs):
        lm.prefill(embeds, lm.positions(request), cache, request.cut)
    want = Engine().run([tree_pass(lm, tree, theirs)])[0].logits()
    lean = LeanText(lm)
    base, offset = torch.tensor([ours.length]), torch.tensor([ours.offset])
    hidden = lean(tree.tokens, torch.tensor(tree.depths), 0, Sight(tree.mask.to(torch.int8)), base, offset, ours)
    terms = additions(lm.hf, theirs.length)
    assert_same_sums(lean.logits(hidden), want, terms)
    rows = slice(0, theirs.length)
    assert_same_sums(ours.keys[..., rows, :], theirs.keys[..., rows, :], terms)
    assert_same_sums(ours.values[..., rows, :], theirs.values[..., rows, :], terms)


@functools.cache
def eager_steps(family: str, drafter: str) -> list[Step]:
    return list(graph_of(family, drafter, Engine()).decode(tiny.prompt(family), 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "drafter", "backend"),
    [*product(tiny.FAMILIES, DRAFTERS, ["direct"]), *((*pair, "traced") for pair in TRACED)],
)
def test_graphs_is_eager(family, drafter, backend):
    request, engine, eager = tiny.prompt(family), GraphsEngine(backend), eager_steps(family, drafter)
    graphs = list(graph_of(family, drafter, engine).decode(request, 24))
    assert tokens_of(graphs) == tokens_of(eager) == tiny.hf_greedy(tiny.model(family), request, 24)
    assert [s.accepted for s in graphs] == [s.accepted for s in eager]
    alone = autoregressive(tiny.model(family), request, 24, GreedyVerifier(), engine=GraphsEngine(backend))
    assert tokens_of(list(alone)) == tokens_of(eager)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_behind_the_video_runs_by_the_arithmetic_of_steps(family, images, monkeypatch):
    """An exact engine needs a GPU. Here its arithmetic is that of plain operations."""
    monkeypatch.setattr(GraphsEngine, "exact", lambda engine, model: True)
    monkeypatch.setattr("specvlm.engine.exact_prefill.ROWS", 4)  # the text takes several slices
    request, lm = tiny.prompt(family, images=images, frames=5), tiny.model(family)
    assert request.text == request.cut < len(request) - 4
    inputs, found = (lm.embed(request, lm.features(request)), lm.positions(request)), []
    for engine in (Engine(), GraphsEngine("direct")):
        cache, passes = lm.new_cache(len(request)), []
        monkeypatch.setattr(
            exact_prefill, "run_pass", lambda lean, one, watch, seen=passes: seen.append(one) or run_pass(lean, one)
        )
        with torch.inference_mode():
            found.append((engine.prefill(lm, request, inputs, cache), cache.keys.clone(), cache.values.clone()))
        assert cache.length == len(request)
    assert [one.start % 4 for one in passes[1:]] == [0] * (len(passes) - 1) and sum(map(len, passes)) == len(
        request
    ) - request.cut
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("pruner", [NonePruner(), TwoStagePruner()])
def test_every_ratio(pruner, ratio):
    request, engine = tiny.prompt("qwen2_5_vl"), GraphsEngine("direct")
    out = tokens_of(list(graph_of("qwen2_5_vl", "tree", engine, pruner, ratio).decode(request, 20)))
    assert out == tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 20)


def test_the_same_model_accepts_everything():
    """Without pruning and with one set of weights, a path of the paper's tree, five deep, is accepted in full."""
    request = tiny.prompt("qwen2_5_vl")
    steps = list(graph_of("qwen2_5_vl", "self", GraphsEngine("direct"), NonePruner()).decode(request, 30))
    assert acceptance_of(steps)["accepted_per_round"] == 5.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_repetition_penalty(family, monkeypatch):
    monkeypatch.setattr(tiny.model(family), "repetition_penalty", 1.3)
    request = tiny.prompt(family)
    outs = [tokens_of(list(graph_of(family, "tree", e).decode(request, 24))) for e in (Engine(), GraphsEngine("direct"))]
    assert outs[0] == outs[1]
    assert outs[0] != tiny.hf_greedy(tiny.model(family), request, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_penalty_is_applied_in_float32_as_generate_does(dtype):
    """In 16 bits, the two logits would round to the same number."""
    from transformers import RepetitionPenaltyLogitsProcessor

    seen, logits_1V = torch.tensor([[0, 2]]), torch.tensor([[2.109375, 2.0, -1.0, 0.5]]).to(dtype)
    penalty = RepetitionPenalty(1.05, torch.tensor([True, False, True, False]))
    wide = logits_1V if dtype == torch.float64 else logits_1V.float()
    right = RepetitionPenaltyLogitsProcessor(1.05)(seen, wide.clone())
    assert torch.equal(penalty(logits_1V), right) and int(right.argmax()) == 0
    assert RepetitionPenalty(1.0, penalty.seen_V)(logits_1V) is logits_1V


@pytest.mark.parametrize("drafter", ["tree", "chain", "prompt_lookup"])
def test_sampling_draws_what_eager_draws(drafter):
    """The same seed gives the same tokens, except where children are sampled: then the engines draw in other orders."""
    request, verifier = tiny.prompt("qwen2_5_vl"), SamplingVerifier(temperature=0.8, top_k=20)
    if drafter == "prompt_lookup":
        outs = [
            tokens_of(list(graph_of("qwen2_5_vl", drafter, e, verifier=verifier).decode(request, 24)))
            for e in (Engine(), GraphsEngine("direct"))
        ]
        assert outs[0] == outs[1]
    else:
        steps = list(graph_of("qwen2_5_vl", drafter, GraphsEngine("direct"), verifier=verifier).decode(request, 24))
        assert len(tokens_of(steps)) == 24 and sum(s.accepted for s in steps) > 0
    alone = [
        tokens_of(list(autoregressive(tiny.model("qwen2_5_vl"), request, 16, verifier, engine=e)))
        for e in (Engine(), GraphsEngine("direct"))
    ]
    assert alone[0] == alone[1]


def outlives_a_failure(graph: DecodingGraph, requests, want) -> None:
    """Check that requests give their own output before and after one that fails halfway."""
    assert [tokens_of(list(graph.decode(r, 16))) for r in requests] == want
    check, calls = graph.engine.check, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the middle")
        return check(*arguments)

    graph.engine.check = broken
    with pytest.raises(torch.OutOfMemoryError):
        list(graph.decode(requests[0], 16))
    assert [tokens_of(list(graph.decode(r, 16))) for r in requests] == want


@pytest.mark.slow
def test_requests_one_after_another_and_after_a_broken_one():
    """Different lengths, one that makes the cache grow, one abandoned, one that fails: none affects the next."""
    family = "qwen2_5_vl"
    graph = graph_of(family, "tree", GraphsEngine("direct"))
    requests = [tiny.prompt(family, seed=s, frames=f) for s, f in ((0, 4), (1, 2), (2, 80), (3, 4))]
    want = [tiny.hf_greedy(tiny.model(family), r, 16) for r in requests]
    half = graph.decode(requests[0], 16)
    next(half), next(half)
    assert tokens_of(list(graph.decode(requests[1], 16))) == want[1]
    outlives_a_failure(graph, requests, want)


def test_what_earlier_requests_left_in_the_cache_is_never_read():
    request, graph = tiny.prompt("qwen2_5_vl"), graph_of("qwen2_5_vl", "tree", GraphsEngine("direct"))
    want = tokens_of(list(graph.decode(request, 16)))
    with torch.inference_mode():
        for cache in graph.caches.held:
            cache.keys[..., len(request) + 40 :, :] = cache.values[..., len(request) + 40 :, :] = float("nan")
    assert tokens_of(list(graph.decode(request, 16))) == want


def test_a_capture_writes_no_row_of_the_prompt(monkeypatch):
    """Caches are exactly full: the warm-up of a long chain finds no free slots at the end."""
    monkeypatch.setattr("specvlm.models.kv_cache.pooled", lambda slots: slots)
    lm = tiny.model("qwen2_5_vl")
    graph = DecodingGraph(
        lm,
        lm,
        NonePruner(),
        TreeDrafter(shape="chain:12"),
        GreedyVerifier(),
        GenerationOptions(ratio=0.0),
        engine=GraphsEngine("direct"),
    )
    assert [step.accepted for step in graph.decode(tiny.prompt("qwen2_5_vl"), 6)] == [0, 12]


@pytest.mark.slow
def test_graphs_and_rules_that_share_an_engine():
    request, engine = tiny.prompt("qwen2_5_vl"), GraphsEngine("direct")
    other, want = tiny.prompt("qwen2_5_vl", seed=1), tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 16)
    first, second = (graph_of("qwen2_5_vl", "tree", engine).decode(r, 16) for r in (request, other))
    steps = [pair for pair in zip_longest(first, second)]
    assert tokens_of([one for one, _ in steps if one]) == want
    assert tokens_of([two for _, two in steps if two]) == tiny.hf_greedy(tiny.model("qwen2_5_vl"), other, 16)
    sampling = SamplingVerifier(temperature=0.8)
    for vocabulary in (97, 90):  # rows of q of another width
        graph = graph_of("qwen2_5_vl", "tree", engine, verifier=sampling)
        graph.vocabulary = vocabulary
        assert len(tokens_of(list(graph.decode(request, 12)))) == 12

    class Second(GreedyVerifier):
        name = "second"

        def first(self, logits_V, generator):
            return int(logits_V.topk(2).indices[1])

    outs = [
        tokens_of(list(autoregressive(tiny.model("qwen2_5_vl"), request, 6, Second(), engine=e))) for e in (Engine(), engine)
    ]
    assert outs[0] == outs[1]


@pytest.mark.slow
def test_captured_once_for_a_shape_and_a_cache():
    family = "qwen2_5_vl"
    graph = graph_of(family, "tree", GraphsEngine("direct"))
    for seed in range(4):
        list(graph.decode(tiny.prompt(family, seed=seed), 12))
    first = {key: held[1] for key, held in graph.engine._programs.items()}
    assert len(first) == 2
    list(graph.decode(tiny.prompt(family, frames=90), 12))  # both caches grow
    assert first.keys() == graph.engine._programs.keys()
    assert all(graph.engine._programs[key][1] is not program for key, program in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [TreeDrafter(), DynamicTreeDrafter(nodes=6)], ids=["static", "grown"])
def test_a_capture_while_the_drafter_starts_is_no_time_of_its_prefill(drafter, monkeypatch):
    """Another request has changed the draft's cache, as in a comparison with a baseline."""
    capture, spent, late = GraphsEngine.capture, 1000.0, [0.0]
    for module in ("decoding.timing", "engine.cuda_graphs"):
        monkeypatch.setattr(f"specvlm.{module}.perf_counter", lambda: perf_counter() + late[0])

    def slow(*args):
        late[0] += spent
        return capture(*args)

    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    draft = tiny.draft_of("qwen2_5_vl")
    graph = DecodingGraph(
        lm, draft, UniformPruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=0.5), engine=GraphsEngine("direct")
    )
    list(graph.decode(request, 8))
    changes = graph.caches.changes
    list(graph.decode(request, 8))
    assert graph.caches.changes == changes
    graph.caches.reserve("draft", lm, 4096)
    assert graph.caches.changes == changes + 1
    monkeypatch.setattr(GraphsEngine, "capture", slow)
    first, step, *later = graph.decode(request, 8)
    assert step.times_s["capture"] >= spent > step.times_s["draft_prefill"] and step.times_s["draft"] < spent
    assert not any("capture" in other.times_s for other in (first, *later))
    speed = speed_of([first, step, *later])
    assert speed["drafter_start_s"] < spent and speed["end_to_end_s"] == pytest.approx(
        sum(speed[part] for part in ("time_to_first_token_s", "drafter_start_s", "decode_s"))
    )


def test_trees_that_never_repeat_are_captured_so_many_times_and_no_more(monkeypatch):
    """The request also reports when: capture time is not counted as time of a check."""
    monkeypatch.setattr("specvlm.engine.cuda_graphs.MOST", 3)
    request, engine = tiny.prompt("qwen2_5_vl"), GraphsEngine("direct")

    class Growing(PromptLookupDrafter):
        """Drafter with another number of guesses in every round."""

        name = "growing"

        def start(self, ctx):
            session, sizes = super().start(ctx), iter(range(1, 99))
            session._continuation = lambda: [7] * next(sizes)
            return session

    graph = DecodingGraph(tiny.model("qwen2_5_vl"), None, UniformPruner(), Growing(length=30), GreedyVerifier(), engine=engine)
    steps = list(graph.decode(request, 20))
    assert tokens_of(steps) == tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 20)
    assert len(engine._programs) == 3 < len(steps) - 1
    assert ["capture" in step.times_s for step in steps[1:]] == [True] * 3 + [False] * (len(steps) - 4)
    speed = speed_of(steps)
    assert speed["decode_s"] == pytest.approx(sum(s.times_s["draft"] + s.times_s["verify"] for s in steps[1:]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_appended_by_an_engine_are_its_steps(family):
    """Across several passes of maximum width; comparisons of outputs read these rows."""
    lm, request = tiny.model(family), tiny.prompt(family)
    tokens = torch.randint(5, 80, (150,), generator=torch.Generator().manual_seed(0))
    logits = []
    for engine in (Engine(), GraphsEngine("direct")):
        cache = lm.new_cache(len(request) + 160)
        with torch.inference_mode():
            lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut)
            logits.append(engine.append(lm, tokens, cache))
        assert cache.length == len(request) + 150
    assert_same_sums(*logits, terms=additions(lm.hf, len(request) + 150))


def test_a_comparison_judges_by_the_engines_own_arithmetic(monkeypatch):
    """An engine that rounds more coarsely is another model: one engine's fault can be the other's right output."""
    lm, request = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl")
    engine, exact = GraphsEngine("direct"), LeanText.logits
    want = tokens_of(list(autoregressive(lm, request, 12, GreedyVerifier(), engine=Engine())))
    monkeypatch.setattr(LeanText, "logits", lambda self, hidden: exact(self, hidden).roll(1, -1))
    shifted = tokens_of(list(autoregressive(lm, request, 12, GreedyVerifier(), engine=engine)))
    assert shifted != want
    assert lossless.compare(lm, request, want, shifted, engine=Engine()).verdict == "mismatch"
    # After the prefill's own token, every token is the engine's choice.
    assert lossless.compare(lm, request, [*shifted[:3], 5, *shifted[4:]], shifted, engine=engine).gap == 0.0


@pytest.mark.slow
def test_a_rule_of_the_host_is_judged_by_the_pass_that_it_read(monkeypatch):
    """Its checks are not captured but still run the lean pass, and so does their replay."""

    class OnHost(GreedyVerifier):
        name = "on_host"

        def verify(self, ctx):
            return super().verify(ctx)

    lm, request, exact = tiny.model("qwen2_5_vl"), tiny.prompt("qwen2_5_vl"), LeanText.logits
    want = tokens_of(list(autoregressive(lm, request, 12, GreedyVerifier())))
    monkeypatch.setattr(LeanText, "logits", lambda self, hidden: exact(self, hidden).roll(1, -1))
    engine = GraphsEngine("direct")
    steps = list(graph_of("qwen2_5_vl", "tree", engine, verifier=OnHost()).decode(request, 12))
    shifted = tokens_of(steps)
    assert shifted != want
    found = lossless.compare(lm, request, want, shifted, engine=engine, steps=steps, verifier=OnHost())
    assert "done again" not in found.reason and found.token == 1


def test_a_draft_that_lies_on_a_cpu_is_not_captured():
    """An empty graph would draft the same tokens for ever, and the output would not show it."""
    engine = GraphsEngine("direct")
    engine.backend = "cudagraph"
    assert engine.runs(tiny.draft_of("qwen2_5_vl")) == "eager"


def test_each_model_says_which_engine_it_runs_on(monkeypatch):
    target, draft = tiny.model("qwen2_5_vl"), tiny.draft_of("qwen2_5_vl")
    monkeypatch.setattr("specvlm.engine.cuda_graphs.why_not", lambda model: "it is odd" if model is draft else None)
    engine = GraphsEngine("direct")
    assert (engine.runs(target), engine.runs(draft), Engine().runs(target)) == ("graphs", "eager", "eager")


def test_a_large_tree_and_a_rule_of_the_host_run_eager():
    request = tiny.prompt("qwen2_5_vl")
    want = tiny.hf_greedy(tiny.model("qwen2_5_vl"), request, 16)

    class OnHost(GreedyVerifier):
        name = "on_host"

        def verify(self, ctx):
            return super().verify(ctx)

    assert not OnHost().on_device
    out = graph_of("qwen2_5_vl", "tree", GraphsEngine("direct"), verifier=OnHost())
    assert tokens_of(list(out.decode(request, 16))) == want
    large = DecodingGraph(
        tiny.model("qwen2_5_vl"), tiny.draft_of("qwen2_5_vl"), UniformPruner(), TreeDrafter(shape="5x4x3"), GreedyVerifier(),
        engine=GraphsEngine("direct"),
    )  # fmt: skip
    assert tokens_of(list(large.decode(request, 16))) == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_models(kind):
    """The output is that of the same quantised target, and the lean pass equals its modules."""
    import copy

    lm = tiny.wrap(copy.deepcopy(tiny.model("qwen2_5_vl").hf))
    quantize_text(lm.hf, kind)
    request = tiny.prompt("qwen2_5_vl")
    outs = [
        tokens_of(
            list(
                DecodingGraph(
                    lm, tiny.draft_of("qwen2_5_vl"), UniformPruner(), TreeDrafter(), GreedyVerifier(), engine=e
                ).decode(request, 20)
            )
        )
        for e in (Engine(), GraphsEngine("direct"))
    ]
    assert outs[0] == outs[1] == tokens_of(list(autoregressive(lm, request, 20, GreedyVerifier())))


def test_engine_for():
    assert type(engine_for("auto", "cpu")) is Engine
    assert type(engine_for("eager", "cpu")) is Engine
    fallback = engine_for("graphs", "cpu")
    assert isinstance(fallback, Fallback) and fallback.name == "eager"
    assert "cpu is not a CUDA device" in fallback.note and "\n" not in fallback.note
    with pytest.raises(UserError, match="engine=fast is none of auto, eager, graphs"):
        engine_for("fast")


@pytest.mark.parametrize("capability, kind", [((8, 0), Engine), ((8, 9), Engine), ((9, 0), GraphsEngine)])
def test_a_gpu_older_than_hopper_captures_only_if_asked_and_says_that_it_is_untested(capability, kind, monkeypatch):
    monkeypatch.setattr("specvlm.engine.why_not_captured", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "an older GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = engine_for("graphs", "cuda:0")
    assert type(engine_for("auto", "cuda:0")) is kind and type(asked) is GraphsEngine
    assert asked.note == (
        "" if kind is GraphsEngine else "engine=graphs is untested on an older GPU: it was measured on Hopper GPUs only"
    )
