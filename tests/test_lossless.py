"""Whatever is pruned, drafted and guessed, the output is the target's own and equals Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import tiny
import torch
from campaign import planted_faults
from campaign.faults import planted
from covering import sampled
from towers import remember_features, remember_passes

from specvlm.app.console import too_many_ties
from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.models import memory_plan
from specvlm.models.kv_cache import pooled
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.pruners.verifier_attention import VerifierAttentionPruner
from specvlm.strategies.pruners.window import WindowPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions

PRUNERS = [
    NonePruner(),
    UniformPruner(),
    RandomPruner(),
    WindowPruner("front"),
    WindowPruner("middle"),
    WindowPruner("back"),
    VerifierAttentionPruner(),
    TwoStagePruner(),
    TwoStagePruner(spread="frame"),
    FastVPruner(layer=2),
    FastVPruner(layer=2, source="draft"),
]
OF_A_PRUNED_VIEW = [
    TreeDrafter(),
    TreeDrafter("chain:5"),
    TreeDrafter("3x1x2"),
    DynamicTreeDrafter(),
    EntropyTreeDrafter(),
    SelfDrafter(),
]
GREEDY = GreedyVerifier()
SEVERAL = sampled(
    tiny.FAMILIES,
    [dict(videos=2), dict(images=1), dict(videos=3, images=1)],
    [TwoStagePruner(), TwoStagePruner(spread="frame"), FastVPruner(source="draft")],
    ["original", "reindexed"],
    pairs=True,
)
SHORT = 18  # tokens, where every pruner meets every drafter: rounds enough for guesses that stand and guesses that fall


@cache
def model(family: str) -> VideoLM:
    """`tiny.model` that runs each pass once: where pruners keep the same tokens, drafts and checks begin alike."""
    return remember_passes(remember_features(tiny.wrap(tiny.model(family).hf)))


@cache
def draft_of(family: str) -> VideoLM:
    return remember_passes(remember_features(tiny.wrap(tiny.draft_of(family).hf)))


@cache
def answer_of_generate(family: str) -> list[int]:
    return tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 30)


def decode(family, pruner=None, drafter=None, ratio=0.5, limit=30, request=None, draft=None, **fields):
    graph = DecodingGraph(
        model(family),
        draft or draft_of(family),
        pruner or NonePruner(),
        drafter or TreeDrafter(),
        GREEDY,
    )
    return list(graph.decode(request or tiny.prompt(family), GenerationOptions(limit, ratio, **fields)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("request_of", [dict(), dict(videos=2), dict(images=1), dict(videos=2, images=2)], ids=str)
def test_autoregressive_equals_hugging_face_generate(family, request_of):
    request = tiny.prompt(family, **request_of)
    expected = tiny.hf_greedy(tiny.model(family), request, 30)
    assert tokens_of(list(autoregressive(tiny.model(family), request, 30, GREEDY))) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pruner", "drafter"), sampled(tiny.FAMILIES, PRUNERS, OF_A_PRUNED_VIEW, pairs=True), ids=str
)
def test_every_pruner_and_drafter_gives_the_output_of_generate(family, pruner, drafter):
    for ratio in (0.5, 0.9):
        answer = tokens_of(decode(family, pruner, drafter, ratio, limit=SHORT))
        assert answer == answer_of_generate(family)[:SHORT], f"ratio {ratio}"


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "family"), sampled(OF_A_PRUNED_VIEW, tiny.FAMILIES), ids=str)
def test_where_all_or_nothing_is_kept_no_pruner_is_asked(family, drafter, monkeypatch):
    monkeypatch.setattr(UniformPruner, "select", None)
    for ratio in (0, 1):
        assert tokens_of(decode(family, UniformPruner(), drafter, ratio)) == answer_of_generate(family), f"ratio {ratio}"


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "family"), sampled([SparseDrafter(24, 5), PromptLookupDrafter()], tiny.FAMILIES), ids=str)
def test_drafters_that_ask_no_pruner_give_the_output_of_generate(family, drafter, monkeypatch):
    monkeypatch.setattr(UniformPruner, "select", None)
    for ratio in (0, 0.5, 1):
        assert tokens_of(decode(family, UniformPruner(), drafter, ratio)) == answer_of_generate(family), f"ratio {ratio}"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "request_of", "pruner", "positions"), SEVERAL, ids=str)
def test_several_videos_and_images_stay_lossless(family, request_of, pruner, positions):
    request = tiny.prompt(family, **request_of)
    expected = tiny.hf_greedy(tiny.model(family), request, 20)
    for ratio, limit in ((0.5, 20), (0.9, 12), (1, 12)):
        output = tokens_of(decode(family, pruner, ratio=ratio, limit=limit, request=request, positions=positions))
        assert output == expected[:limit], f"ratio {ratio}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("drafter", [TreeDrafter(), TreeDrafter("chain:5"), SelfDrafter("3x2x1x1x1")], ids=repr)
def test_a_drafter_that_is_the_target_and_sees_all_is_accepted_in_full(family, drafter):
    found = acceptance_of(decode(family, NonePruner(), drafter, limit=60, draft=model(family)))
    assert found["accepted_per_round"] == 5.0 and found["acceptance_by_depth"] == [1.0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reindexed_positions_are_harmless_when_nothing_is_dropped_in_1d(family):
    steps = decode(family, NonePruner(), positions="reindexed", limit=60, draft=model(family))
    assert (acceptance_of(steps)["accepted_per_round"] == 5.0) == (family == "llava_onevision")


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stop_ids_and_the_token_limit_are_exact(family):
    request = tiny.prompt(family)
    answer = tiny.hf_greedy(tiny.model(family), request, 40)
    for limit in (1, 2, 3, 6, 7, 40):
        assert tokens_of(decode(family, limit=limit, draft=model(family))) == answer[:limit]
    unused = next(token for token in range(97) if token not in answer)
    for at in (0, 1, 4, 9):
        stop = answer[at]
        first = answer.index(stop)
        lm = tiny.wrap(tiny.model(family).hf)
        lm.stop_ids = frozenset({unused, stop})
        graph = DecodingGraph(lm, tiny.model(family), NonePruner(), TreeDrafter(), GREEDY)
        assert tokens_of(list(graph.decode(request, 40))) == answer[: first + 1]
        assert tokens_of(list(autoregressive(lm, request, 40, GREEDY))) == answer[: first + 1]


def test_a_difference_is_an_error_only_where_every_run_prefills_alike(monkeypatch):
    """With few rows a pass: the rows of an image behind the video, and text alone, are collected in one, else in several."""
    monkeypatch.setattr(lossless, "CHUNK", 6)
    monkeypatch.setattr(Engine, "exact", lambda self, model: True)
    lm, ids = tiny.model("qwen2_5_vl"), [tiny.START, tiny.VIDEO, tiny.END]
    (grid, video), picture = tiny.video("qwen2_5_vl"), tiny.image("qwen2_5_vl")
    behind = lm.expand([5, *ids, tiny.IMAGE, 6, 7, 8], [grid], [video], [picture])
    before = lm.expand([5, tiny.IMAGE, *ids, *range(10, 20)], [grid], [video], [picture])
    short = lm.expand([5, *ids, tiny.IMAGE], [grid], [video], [picture])
    texts = lm.expand([*range(10, 16)], [], []), lm.expand([*range(10, 17)], [], [])
    found = [lossless._exact(Engine(), lm, prompt) for prompt in (before, behind, short, *texts)]
    assert found == [True, False, True, True, False]
    assert not lossless._exact(None, lm, before)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_vocabularies_may_differ(family):
    request = tiny.prompt(family)
    expected = tiny.hf_greedy(tiny.model(family), request, 20)
    for vocabulary in (94, 128):
        assert tokens_of(decode(family, limit=20, draft=tiny.model(family, seed=3, vocabulary=vocabulary))) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_requests_of_different_length_share_caches_without_a_trace(family):
    graph = DecodingGraph(
        tiny.model(family), tiny.draft_of(family), TwoStagePruner(), TreeDrafter(), GREEDY, GenerationOptions(ratio=0.5)
    )
    requests = [tiny.prompt(family, seed, frames=frames) for seed, frames in ((0, 4), (1, 9), (2, 3), (0, 4))]
    for request in requests:
        assert tokens_of(list(graph.decode(request, 20))) == tiny.hf_greedy(tiny.model(family), request, 20)
    for read in (1, 2):
        for half_read in (
            graph.decode(requests[0], 20),
            autoregressive(graph.target, requests[0], 20, GREEDY, graph.caches),
        ):
            first = [next(half_read) for _ in range(read)]
            assert tokens_of(list(graph.decode(requests[1], 20))) == tiny.hf_greedy(graph.target, requests[1], 20)
            assert tokens_of([*first, *half_read]) == tiny.hf_greedy(graph.target, requests[0], 20)


@pytest.mark.slow
def test_float32_equals_generate_too():
    for family in tiny.FAMILIES:
        target, draft = tiny.model(family, dtype=torch.float32), tiny.draft_of(family, dtype=torch.float32)
        request = tiny.prompt(family)
        for drafter in (TreeDrafter(), DynamicTreeDrafter(), EntropyTreeDrafter(), SparseDrafter(24)):
            graph = DecodingGraph(target, draft, TwoStagePruner(), drafter, GREEDY, GenerationOptions(ratio=0.5))
            assert tokens_of(list(graph.decode(request, 24))) == tiny.hf_greedy(target, request, 24)


def test_the_comparison_tells_a_fault_from_a_tie():
    family = "qwen2_5_vl"
    target, request = tiny.model(family, dtype=torch.float32), tiny.prompt(family)
    answer = tiny.hf_greedy(target, request, 12)
    assert lossless.compare(target, request, answer, answer).verdict == "identical"
    wrong = [*answer[:5], (answer[5] + 1) % 90, *answer[6:]]
    found = lossless.compare(target, request, answer, wrong)
    assert (found.verdict, found.token) == ("mismatch", 5) and found.gap > 100 * found.drift
    assert lossless.compare(target, request, answer, answer[:7]).verdict == "mismatch"


def test_a_tie_is_called_one_with_its_gap():
    family = "qwen2_5_vl"
    target, request = tiny.model(family, dtype=torch.float32), tiny.prompt(family)
    answer = tiny.hf_greedy(target, request, 12)
    twin = tiny.wrap(tiny.copy.deepcopy(target.hf))
    other = next(t for t in range(5, 80) if t not in answer)
    twin.hf.lm_head.weight[other] = twin.hf.lm_head.weight[answer[5]]  # now the two tokens tie exactly
    tied = [*answer[:5], other]
    while len(tied) < len(answer):  # what the target itself says behind the other token
        tied.append(follow(twin, request, tied))
    found = lossless.compare(twin, request, answer, tied)
    assert (found.verdict, found.token, found.gap) == ("tie", 5, 0.0) and "numeric tie at token 5" in str(found)
    assert found.candidates == (other, answer[5]) and found.gap_many_rows == 0.0
    found = lossless.compare(twin, request, answer, [*tied[:8], (tied[8] + 1) % 90, *tied[9:]])
    assert (found.verdict, found.token) == ("mismatch", 8), "a fault behind a tie is one all the same"
    assert lossless.compare(twin, request, answer, tied[:9]).verdict == "mismatch"


@pytest.fixture
def rounded(monkeypatch):
    """Perturb logits of passes of several rows by up to half a bfloat16 rounding, as another summation order might."""
    exact = VideoLM.head

    def head(self, hidden_QD):
        logits_QV = exact(self, hidden_QD)
        if len(hidden_QD) == 1:
            return logits_QV
        return logits_QV + torch.sin(1000 * logits_QV.float()).to(logits_QV) * logits_QV.abs().max() / 256

    monkeypatch.setattr(VideoLM, "head", head)


@cache
def case_of(family: str, number: int) -> planted_faults.Case:
    """Make a case by passes of one row, which neither `rounded` nor a fault affects."""
    lm = tiny.model(family, dtype=torch.bfloat16)
    return planted_faults.case_of(number, family, tiny.prompt(family, number), lm)


@cache
def right_output(family: str, number: int) -> list[int]:
    """Decode without a fault. Call it before a fault is planted."""
    return tokens_of(planted_faults.steps_of(case_of(family, number)))


@pytest.mark.slow
def test_what_rounding_does_is_a_tie_and_never_a_mismatch(rounded):
    found = [planted_faults.decoded(case_of(family, number))[1] for family in tiny.FAMILIES for number in range(8)]
    assert {comparison.verdict for comparison in found} == {"identical", "tie"}
    assert all(comparison.ties and comparison.gap_many_rows <= 0 for comparison in found if comparison.verdict == "tie")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "the_slot_before_is_hidden",
        "the_slot_before_is_hidden_in_every_masked_pass",
        "rows_below_the_root_stand_early",
        "accepts_within_half_a_logit",
        "accepted_rows_are_not_moved",
        "the_last_of_equals_wins",
        "a_key_row_is_off_by_a_hundredth",
        "the_last_accepted_token_comes_twice",
    ],
)
def test_an_output_that_a_fault_changed_is_no_tie(fault):
    changed = 0
    for number, family in product(range(16), tiny.FAMILIES):
        if number >= 2 and changed:  # what changes an output is another prompt on another processor
            break
        case, right = case_of(family, number), right_output(family, number)
        with planted(fault):
            wrong, said = planted_faults.decoded(case)
        assert said.verdict == ("identical" if wrong == case.baseline else "mismatch"), said
        changed += wrong != right
    assert changed, "the fault did nothing"


def test_a_baseline_that_is_not_the_targets_own_is_no_tie():
    case = case_of("qwen2_5_vl", 0)
    steps = case.decode(case.drafter, NonePruner(), Engine())
    other = [*case.baseline[:5], (case.baseline[5] + 1) % 90, *case.baseline[6:]]
    found = replace(case, baseline=other).judge(steps, Engine())
    assert (found.verdict, found.token) == ("mismatch", 5) and "prefers another token" in found.reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda tree: DraftTree(tree.tokens.roll(1), tree.parents), "did not begin with the last token"),
        (lambda tree: DraftTree(tree.tokens[:1], (-1,)), "was not guessed"),
    ],
)
def test_rounds_that_their_trees_do_not_give_are_a_mismatch(changed, reason):
    """The output is the target's and the baseline is another; only the trees are compared."""
    case = case_of("qwen2_5_vl", 0)
    steps = case.decode(case.drafter, NonePruner(), Engine())
    longest = max(range(1, len(steps)), key=lambda number: len(steps[number].tokens))
    other = [*case.baseline[:-1], (case.baseline[-1] + 1) % 90]
    steps[longest] = replace(steps[longest], tree=changed(steps[longest].tree))
    found = replace(case, baseline=other).judge(steps, Engine())
    assert found.verdict == "mismatch" and reason in found.reason
    assert found.token == len(tokens_of(steps[:longest])) + (0 if "begin" in reason else 1)
    found = lossless.compare(case.target, case.prompt, other, case.baseline, steps=steps[:-1])
    assert found.verdict == "mismatch" and "do not add up" in found.reason


def row_of(ties, tokens=100, dtype="bfloat16"):
    verdict, difference = ("numeric tie at token 1 (gap 0)", {"ties": ties}) if ties else ("identical", None)
    return {"verdict": verdict, "difference": difference, "new_tokens": tokens, "weights": {"target": dtype}}


def test_a_job_with_more_ties_than_rounding_explains_says_so():
    rows = [row_of(0), row_of(1), row_of(2), {"verdict": "lossy"}]
    assert metrics.ties_of(rows) == {"tied": 3, "tokens": 300, "normal": 18} and not too_many_ties(metrics.ties_of(rows))
    assert "numeric ties at 30 of 300 tokens, rounding explains 18" in too_many_ties(metrics.ties_of([row_of(10)] * 3))
    assert too_many_ties(metrics.ties_of([row_of(5, dtype="float32")] * 2))
    assert metrics.ties_of([{"verdict": "lossy"}]) is None and not too_many_ties(None)


def follow(lm, request, tokens):
    cache = lm.new_cache(len(request) + len(tokens))
    lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut)
    return int(Engine().append(lm, torch.tensor(tokens), cache)[-1].argmax())


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "drafter", [TreeDrafter(), DynamicTreeDrafter(), SelfDrafter(), SparseDrafter(24), PromptLookupDrafter()], ids=repr
)
def test_the_checkpoints_repetition_penalty_is_applied_as_generate_does(family, drafter):
    request = tiny.prompt(family)
    plain = tiny.hf_greedy(tiny.model(family), request, 24)
    target, draft = (tiny.wrap(tiny.copy.deepcopy(tiny.model(family).hf)) for _ in range(2))
    target.hf.generation_config.repetition_penalty = target.repetition_penalty = 1.3
    expected = tiny.hf_greedy(target, request, 24)
    assert expected != plain
    assert tokens_of(list(autoregressive(target, request, 24, GREEDY))) == expected
    graph = DecodingGraph(target, draft, UniformPruner(), drafter, GREEDY, GenerationOptions(ratio=0.5))
    assert tokens_of(list(graph.decode(request, 24))) == expected
    assert lossless.compare(target, request, expected, expected).verdict == "identical"


@pytest.mark.parametrize("positions", ["original", "reindexed"])
@pytest.mark.parametrize(
    "drafter", [TreeDrafter(), DynamicTreeDrafter(40, 9, 20), SelfDrafter("chain:2"), PromptLookupDrafter()], ids=repr
)
def test_caches_are_as_large_as_planned_and_no_larger(drafter, positions):
    family, request, limit = "qwen2_5_vl", tiny.prompt("qwen2_5_vl"), 20
    graph = DecodingGraph(
        tiny.model(family),
        tiny.draft_of(family),
        UniformPruner(),
        drafter,
        GREEDY,
        GenerationOptions(ratio=0.9, positions=positions),
    )
    list(graph.decode(request, limit))
    kept = len(request) - len(request.video_index) + graph.budget(request)
    slots = pooled(len(request) + limit + drafter.max_nodes)
    if drafter.model is not None:
        slots += pooled(kept + limit + drafter.max_rows)
    assert graph.caches.nbytes == memory_plan.kv_bytes(tiny.model(family), slots, torch.float64)


@pytest.mark.parametrize(
    ("fields", "part"), [(dict(ratio=-0.1), "ratio"), (dict(ratio=1.5), "ratio"), (dict(positions="sideways"), "positions")]
)
def test_bad_settings_are_refused_in_a_sentence(fields, part):
    with pytest.raises(UserError, match=part):
        decode("qwen2_5_vl", **fields)
