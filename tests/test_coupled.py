"""Coupled sampling: the target's distribution over seeds, and for each seed one answer, whatever drafts it.

Shape suffixes: N rows, V vocabulary, M tree nodes.
"""

from __future__ import annotations

import dataclasses
from copy import copy
from functools import cache

import pytest
import tiny
import torch
from covering import sampled
from scipy.stats import chisquare, kstest
from test_sampling_graph import LENGTH, PENALISED, PLAIN, expected, p_value, request, target
from test_verifiers import random_parents
from towers import remember_features

from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies import Sampling, VerifyContext, gumbel, noise
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.types import DraftTree, GenerationOptions

RUNS = 20_000
RULES = [CoupledVerifier(), CoupledVerifier(0.7, top_p=0.9), CoupledVerifier(1.3, top_k=5)]
DRAFTERS = [
    TreeDrafter(),
    TreeDrafter("chain:3"),
    TreeDrafter("2x2", children="sample"),
    TreeDrafter("2x2", children="top"),
    SelfDrafter("2x1"),
    DynamicTreeDrafter(9, 3, 4),
    EntropyTreeDrafter(),
    SparseDrafter(entries=64, length=3),
    PromptLookupDrafter(),
]


def key(seed: int, index: int = 0) -> torch.Tensor:
    return torch.tensor([seed, index])


# --- noise ------------------------------------------------------------------------------------------------------------


def mixed(bits: int) -> int:
    """SplitMix64's finalizer on unsigned integers of Python."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_noise_is_the_hash_of_seed_index_and_token(seed):
    got = gumbel(key(seed, 7), 50, torch.tensor([0, 3]))
    for row, index in enumerate((7, 10)):
        start = mixed((mixed(seed) + index * 0x9E3779B97F4A7C15) % 2**64)
        bits = [mixed((start + (token + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 12 for token in range(50)]
        uniform = (torch.tensor(bits, dtype=torch.float64) + 0.5) / 2**52
        torch.testing.assert_close(got[row], -(-uniform.log()).log(), rtol=1e-14, atol=1e-14)


def test_noise_depends_neither_on_the_vocabulary_nor_on_other_rows():
    whole = gumbel(key(5, 2), 1000, torch.arange(6))
    assert torch.equal(gumbel(key(5, 2), 300, torch.arange(6)), whole[:, :300])
    for ahead in range(6):
        assert torch.equal(gumbel(key(5, 2 + ahead), 1000), whole[ahead, None])
        assert torch.equal(gumbel(key(5), 1000, torch.tensor([2 + ahead])), whole[ahead, None])


def test_noise_is_gumbel_distributed_and_its_neighbours_are_independent():
    values = torch.stack([gumbel(key(seed), 50, torch.arange(40)) for seed in range(50)])
    assert kstest(values.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    uniform = (-(-values).exp()).exp()
    for other in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(1, 2)):  # of another seed, index and token
        cells = (4 * uniform).long() * 4 + (4 * other).long()
        assert chisquare(cells.flatten().bincount(minlength=16)).pvalue > 1e-3


def test_the_largest_noise_and_the_smallest_are_finite(monkeypatch):
    monkeypatch.setattr(noise, "_mixed", lambda bits: torch.where(bits % 2 == 0, 0, -1))  # the least and greatest hash
    assert gumbel(key(0), 4).isfinite().all()


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_two_tokens_in_a_row_have_the_targets_joint_distribution(rule):
    """20,000 draws; the second token's distribution depends on the first."""
    logits = 1.5 * torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    runs = torch.arange(RUNS)
    first = rule.sampling.scores(logits[6:].expand(RUNS, -1), gumbel(key(0), 6, runs)).argmax(-1)
    second = rule.sampling.scores(logits[first], gumbel(key(1), 6, runs)).argmax(-1)
    counts = (first * 6 + second).bincount(minlength=36)
    p = rule.sampling.probabilities(logits)
    want = (p[6][:, None] * p[:6]).flatten()
    assert counts[want == 0].sum() == 0
    common = want * RUNS >= 5
    seen, hoped = counts[common].double(), want[common] * RUNS
    assert chisquare(seen * hoped.sum() / seen.sum(), hoped).pvalue > 1e-3


def naive(rule: Sampling, tokens: list[int], parents: tuple[int, ...], logits_MV: torch.Tensor, seed: int, index: int):
    """Follow the choices from the root, node by node; the deepest way of several, then the lowest number."""

    def walk(node: int, depth: int) -> tuple[int, int, int]:
        scores = rule.warped(logits_MV[node].double()) + gumbel(key(seed, index + depth), logits_MV.shape[-1])[0]
        best = int(scores.argmax())
        ways = [walk(c, depth + 1) for c, parent in enumerate(parents) if parent == node and tokens[c] == best]
        return max([(depth, -node, best), *ways])

    _, last, bonus = walk(0, 0)
    return -last, bonus


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_verdict_is_the_walk_along_the_targets_choices(rule):
    chance, deepest = torch.Generator().manual_seed(0), 0
    for size in [1, 2, 3, 7, 12, 26] * 20:
        parents = random_parents(size, chance)
        tokens = torch.randint(3, (size,), generator=chance)
        logits = torch.randn(size, 4, generator=chance, dtype=torch.float64)
        logits[:, 3] -= 3
        tree, seed = DraftTree(tokens, parents), size
        for tables in (None, rule.tables(parents)):
            last, bonus = rule.decide(
                VerifyContext(tree, logits, torch.Generator(), tables=tables, key_2=key(seed, 4))
            ).tolist()
            assert (last, bonus) == naive(rule.sampling, tokens.tolist(), parents, logits, seed, 4)
        deepest = max(deepest, len(tree.way_to(last)))
    assert deepest >= 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_a_distribution_are_refused(bad):
    logits = torch.tensor([0.0, bad, 0.0])
    with pytest.raises(ValueError, match="NaN or"):
        CoupledVerifier().first(logits, torch.Generator(), key(0))
    with pytest.raises(ValueError, match="key_2"):
        CoupledVerifier().first(logits, torch.Generator())


def test_equal_logits_keep_the_same_tokens_alone_and_among_others():
    """Also where logits tie at the border of top-p, as they often do in bfloat16."""
    logits = (3 * torch.randn(26, 400, generator=torch.Generator().manual_seed(6))).round().to(torch.bfloat16)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        rule = Sampling(0.7, top_p=top_p, coupled=True)
        whole = rule.warped(logits)
        for row in range(26):
            assert torch.equal(rule.warped(logits[row]), whole[row])
        kept = whole.isfinite().float()
        mass = (logits.double() / 0.7).softmax(-1)
        assert ((kept * mass).sum(-1) >= top_p - 1e-9).all()
        assert ((kept * mass).sum(-1) - (mass + (1 - kept)).min(-1).values <= top_p + 1e-9).all()  # no token too many


# --- through the loop -------------------------------------------------------------------------------------------------


@cache
def pair(family: str, dtype: torch.dtype = torch.float64) -> tuple[VideoLM, VideoLM]:
    pair = tiny.model(family, dtype=dtype), tiny.draft_of(family, dtype=dtype)
    target, draft = (remember_features(copy(lm)) for lm in pair)  # other tests share these models
    return target, draft


@cache
def prompt_of(family: str):
    return tiny.prompt(family, seed=1, frames=4)


def answers(family, rule, drafter, options, engine=None, pruner=None, dtype=torch.float64):
    """Return the target's own answer, that of the drafter, and the mean number of accepted guesses."""
    models, engine = pair(family, dtype), engine or Engine()
    own = tokens_of(list(autoregressive(models[0], prompt_of(family), options, rule, engine=engine)))
    graph = DecodingGraph(*models, pruner or UniformPruner(), drafter, rule, options, engine=engine)
    steps = list(graph.decode(prompt_of(family)))
    return own, tokens_of(steps), sum(step.accepted for step in steps) / (len(steps) - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "family"), sampled(DRAFTERS, tiny.FAMILIES), ids=str)
def test_a_seed_gives_the_targets_own_answer_whatever_drafts(family, drafter):
    for number, rule in enumerate(RULES):
        dtype = (torch.float64, torch.float32)[number % 2]
        for ratio, seed, penalty in ((0.5, 0, 1.0), (0.9, 2**63 + 7, 1.3)):
            options = GenerationOptions(20, ratio, seed=seed, repetition_penalty=penalty)
            own, drafted, _ = answers(family, rule, drafter, options, dtype=dtype)
            assert drafted == own, (rule, seed)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_seeds_give_different_answers(family):
    found = {tuple(answers(family, RULES[0], TreeDrafter(), GenerationOptions(12, seed=seed))[0]) for seed in range(4)}
    assert len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "family", "engine"),
    sampled(
        [SelfDrafter("chain:4"), SparseDrafter(10_000, 4), TreeDrafter("4x2"), DynamicTreeDrafter(6, 3, 2)],
        tiny.FAMILIES,
        ["traced", "eager"],
        pairs=True,
    ),
    ids=str,
)
def test_a_draft_that_equals_the_target_guesses_every_draw(family, drafter, engine):
    """So both use the noise of the same index and seed, captured or not."""
    target, engine = pair(family)[0], Engine() if engine == "eager" else GraphsEngine("traced")
    graph = DecodingGraph(target, target, NonePruner(), drafter, RULES[0], GenerationOptions(17, 0.0, seed=3), engine=engine)
    steps = list(graph.decode(prompt_of(family)))
    full = [step for step in steps[1:] if step.full]
    assert full and all(step.accepted == max(step.tree.depths) for step in full)
    assert tokens_of(steps) == tokens_of(list(autoregressive(target, prompt_of(family), graph.options, RULES[0])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "family", "seed"),
    sampled([TreeDrafter("2x2"), DynamicTreeDrafter(9, 3, 4), PromptLookupDrafter()], tiny.FAMILIES, (0, 1)),
    ids=str,
)
def test_a_captured_engine_draws_what_an_eager_one_draws(family, drafter, seed):
    engine = GraphsEngine("traced")
    for rule in RULES:
        options = GenerationOptions(14, 0.5, seed=seed, repetition_penalty=1.2)
        own, drafted, _ = answers(family, rule, drafter, options, engine)
        assert own == drafted == tokens_of(list(autoregressive(pair(family)[0], prompt_of(family), options, rule)))


@pytest.mark.slow
@pytest.mark.parametrize("how", [PLAIN, PENALISED], ids=str)
def test_over_seeds_the_answer_has_the_targets_distribution(how):
    """Against Hugging Face's model, penalty and warpers. The answer of a drafter is that of its seed (above)."""
    warp = {name: value for name, value in how.items() if name != "penalty"}
    model, rule, found = target(how["penalty"]), CoupledVerifier(**warp), []
    for seed in range(1_000):
        steps = autoregressive(model, request(), GenerationOptions(LENGTH, seed=seed), rule)
        found.append(tuple(tokens_of(list(steps))))
    assert p_value(found, expected(**how)) > 1e-4


@pytest.mark.parametrize("fault", ["another index", "another seed", "a fixed row"])
def test_a_rule_with_the_wrong_noise_gives_another_answer(fault, monkeypatch):
    """The answer is compared with that of the same seed, so a slip in the check of a tree is seen."""
    key_of = CoupledVerifier.decide

    def wrong(self, ctx):
        shift = {"another index": key(0, 1), "another seed": key(1, 0), "a fixed row": key(0, -int(ctx.key_2[1]))}[fault]
        return key_of(self, dataclasses.replace(ctx, key_2=ctx.key_2 + shift) if len(ctx.tree) > 1 else ctx)

    monkeypatch.setattr(CoupledVerifier, "decide", wrong)
    own, drafted, _ = answers("llava_onevision", RULES[0], TreeDrafter(), GenerationOptions(20, 0.5))
    assert drafted != own


# --- what a run says --------------------------------------------------------------------------------------------------


def compared(dtype, change=lambda tokens: tokens, rule=RULES[1], options=None):
    options = options or GenerationOptions(24, 0.5, seed=1)
    models = pair("qwen2_5_vl", dtype)
    own = tokens_of(list(autoregressive(models[0], prompt_of("qwen2_5_vl"), options, rule)))
    graph = DecodingGraph(*models, UniformPruner(), TreeDrafter(), rule, options)
    steps = change(list(graph.decode(prompt_of("qwen2_5_vl"))))
    return lossless.compare(
        models[0],
        prompt_of("qwen2_5_vl"),
        own,
        tokens_of(steps),
        steps=steps,
        verifier=rule,
        options=options,
        sampling=rule.sampling,
    )


def test_equal_answers_are_identical_and_a_changed_token_is_a_mismatch():
    def changed(steps):
        at = next(number for number, step in enumerate(steps) if number > 1)
        steps[at] = dataclasses.replace(steps[at], tokens=((steps[at].tokens[0] + 1) % 50, *steps[at].tokens[1:]))
        return steps

    assert compared(torch.float32).verdict == "identical"
    assert compared(torch.float32, changed).verdict == "mismatch"


@pytest.mark.slow
def test_a_choice_between_nearly_equal_scores_is_a_tie_in_bfloat16():
    """Differences that rounding makes are called ties, and never identical."""
    found = [compared(torch.bfloat16, options=GenerationOptions(48, 0.5, seed=seed), rule=RULES[0]) for seed in range(8)]
    assert {one.verdict for one in found} <= {"identical", "tie"}


@pytest.mark.slow
def test_a_gap_is_how_far_logits_must_move_at_least():
    """Against random moves; without top-k and top-p the gap is also enough."""
    chance = torch.Generator().manual_seed(2)
    for sampling in (Sampling(), Sampling(1.0, coupled=True), Sampling(0.8, top_k=4, coupled=True)):
        choice = lossless.Choice(sampling, 3)
        for _ in range(20):
            logits = torch.randn(8, generator=chance, dtype=torch.float64)
            best = choice.choice(logits, 5)
            for token in range(8):
                gap = choice.gap(logits, 5, token)
                assert (gap == 0) == (token == best)
                if not sampling.top_k:
                    moved = logits.clone()
                    moved[token] += gap + 1e-9
                    assert choice.choice(moved, 5) == token
                for _ in range(20 if gap else 0):  # two logits move, so half of it each is the least
                    moved = logits + 0.99 * gap * (torch.rand(8, generator=chance, dtype=torch.float64) - 0.5)
                    assert choice.choice(moved, 5) != token
