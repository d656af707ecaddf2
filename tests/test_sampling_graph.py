"""Sampling through the whole loop: the first tokens have the target's distribution, whatever drafts them.

The target's distribution is enumerated by Hugging Face's model, penalty and warpers. A world is a one-layer model with
eight tokens, two of them placeholders, so that answers repeat themselves: each drafter has guesses accepted and
rejected.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache

import pytest
import reference
import tiny
import torch
from scipy.stats import chisquare
from towers import remember_features, remember_passes
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters import sparse
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers import sampling
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.testing.tiny import built
from specvlm.types import GenerationOptions

RUNS, LENGTH, FAMILY = 400, 4, "llava_onevision"
VIDEO = 7
CHANCE = 1e-8  # of a p-value below it in one test: in all of them together, less than once in a million suites
SURE = 1e-10  # of a planted fault: the largest p-value is 7e-18
PLAIN = dict(penalty=1.0, temperature=0.5, top_p=0.9)
PENALISED = dict(penalty=1.5, temperature=0.5, top_k=3)
DRAFTERS = [
    TreeDrafter("2x2"),
    TreeDrafter("2x2", children="top"),
    TreeDrafter("chain:2"),
    SelfDrafter("2x1"),
    DynamicTreeDrafter(nodes=4, depth=2, width=2),
    EntropyTreeDrafter(nodes=3, deep=3, narrow=1, shallow=1, wide=3),
    SparseDrafter(entries=11, length=2),
    PromptLookupDrafter(length=3),
]

# Penalty and filters are the verifier's part, and a drafter meets them only where it draws from filtered probabilities,
# of a tree or of a sparse row. The campaign `sampling` crosses all drafters with both.
EVERY = [*((drafter, PENALISED) for drafter in DRAFTERS), (DRAFTERS[0], PLAIN)]
EVERY += [pytest.param(DRAFTERS[6], PLAIN, marks=pytest.mark.exhaustive)]


@cache
def model(noise: float = 0.0) -> VideoLM:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        hf = built(FAMILY, vocabulary=8, num_hidden_layers=1).double()
        hf.config.video_token_id, hf.config.image_token_id = VIDEO, VIDEO - 1
        for weight in hf.parameters() if noise else ():
            weight.data += noise * torch.randn_like(weight)
    return remember_passes(remember_features(tiny.wrap(hf)))  # thousands of decodes of a few hundred contexts


def target(penalty: float = 1.0) -> VideoLM:
    lm = copy.copy(model())
    lm.repetition_penalty = penalty
    return lm


@cache
def request():
    grid, video = tiny.video(FAMILY, frames=1)
    return model().expand([1, 2, 3, VIDEO, 1, 2, 3, 4, 1], [grid], [video])


@cache
@torch.inference_mode()
def expected(penalty: float, **warp: float) -> dict[tuple[int, ...], float]:
    """Return each answer's probability, by Hugging Face's model and logits processors in the order of `generate`."""
    hf, prompt, table = reference.pristine(model().hf), request(), {}
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(warp["temperature"])])
    processors += [TopKLogitsWarper(warp["top_k"])] if "top_k" in warp else []
    processors += [TopPLogitsWarper(warp["top_p"])] if "top_p" in warp else []

    def go_on(answer: tuple[int, ...], weight: float, logits_1V: torch.Tensor, past: DynamicCache) -> None:
        if len(answer) == LENGTH:
            table[answer] = weight
            return
        so_far_1S = torch.tensor([[*prompt.tokens.tolist(), *answer]])
        p_V = processors(so_far_1S, logits_1V.clone()).softmax(-1)[0]
        for token in p_V.nonzero().flatten().tolist():
            own = copy.deepcopy(past)
            out = hf(input_ids=torch.tensor([[token]]), past_key_values=own, use_cache=True)
            go_on((*answer, token), weight * float(p_V[token]), out.logits[:, -1], own)

    past = DynamicCache(config=hf.config.text_config)
    out = hf(**reference.inputs_of(hf, prompt), past_key_values=past, use_cache=True)
    go_on((), 1.0, out.logits[:, -1], past)
    return table


def p_value(answers: list[tuple[int, ...]], table: dict[tuple[int, ...], float]) -> float:
    """Return chi-square's p-value; 0 if there is an answer that the target cannot give."""
    counts = Counter(answers)
    if not set(counts) <= set(table):
        return 0.0
    # Cells of fewer than ten expected go together, or the statistic is not chi-square distributed.
    large = [answer for answer, p in table.items() if p * len(answers) >= 10]
    seen, wanted = [counts[a] for a in large], [table[a] * len(answers) for a in large]
    rest = sum(p for answer, p in table.items() if answer not in set(large)) * len(answers)
    if rest >= 10:
        seen, wanted = [*seen, len(answers) - sum(seen)], [*wanted, rest]
    else:
        seen[-1], wanted[-1] = seen[-1] + len(answers) - sum(seen), wanted[-1] + rest
    return chisquare(seen, wanted).pvalue


def sampled(drafter, penalty, runs=RUNS, first=0, **warp):
    """Return answers, and how many guesses were made and accepted."""
    graph = DecodingGraph(
        target(penalty), model(0.1), UniformPruner(), drafter, SamplingVerifier(**warp), GenerationOptions(ratio=0.5)
    )
    answers, guesses, accepted = [], 0, 0
    for seed in range(first, first + runs):
        steps = list(graph.decode(request(), GenerationOptions(LENGTH, 0.5, seed=seed)))
        answers.append(tuple(tokens_of(steps)))
        guesses, accepted = guesses + sum(step.drafted for step in steps), accepted + sum(step.accepted for step in steps)
    return answers, guesses, accepted


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "how"), EVERY, ids=str)
def test_every_drafter_samples_as_the_target_does(drafter, how):
    answers, guesses, accepted = sampled(drafter, **how)
    assert RUNS / 5 < accepted < guesses - RUNS / 5, "guesses must often be accepted, and often refused"
    assert p_value(answers, expected(**how)) > CHANCE


@pytest.mark.slow
def test_the_target_alone_samples_so_and_another_temperature_or_penalty_would_be_seen():
    lm, verifier = target(1.5), SamplingVerifier(temperature=0.4, top_k=3)
    answers = [
        tuple(tokens_of(list(autoregressive(lm, request(), GenerationOptions(LENGTH, seed=seed), verifier))))
        for seed in range(RUNS)
    ]
    assert p_value(answers, expected(1.5, temperature=0.4, top_k=3)) > CHANCE
    assert p_value(answers, expected(1.5, temperature=1.0, top_k=3)) < SURE
    assert p_value(answers, expected(1.0, temperature=0.4, top_k=3)) < SURE


# ---- planted faults, each seen through the loop -----------------------------------------------------------------------


def refused_guesses_stay_in_the_residual(monkeypatch):
    attempt = sampling._try
    monkeypatch.setattr(sampling, "_try", lambda x_n1, p_nV, q_nV: (attempt(x_n1, p_nV, q_nV)[0], p_nV))


def least_likely_guesses_told_as_drawn(monkeypatch):
    monkeypatch.setattr(sparse, "draw", lambda q_QV, race_QV, count: torch.where(q_QV > 0, q_QV, 2).argmin(-1, keepdim=True))


def penalty_that_sees_no_tree(monkeypatch):
    penalise = RepetitionPenalty.__call__
    monkeypatch.setattr(RepetitionPenalty, "__call__", lambda self, logits_MV, *tree: penalise(self, logits_MV))


def a_guess_that_stands_wherever_it_is_likely(monkeypatch):
    attempt = sampling._try

    def lenient(x_n1, p_nV, q_nV):
        accept_n, rest_nV = attempt(x_n1, p_nV, q_nV)
        return torch.where(accept_n > 0.3, 1.0, accept_n), rest_nV

    monkeypatch.setattr(sampling, "_try", lenient)


FAULTS = [
    ("tree", refused_guesses_stay_in_the_residual),
    ("sparse", least_likely_guesses_told_as_drawn),
    ("self", penalty_that_sees_no_tree),
    ("prompt_lookup", a_guess_that_stands_wherever_it_is_likely),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_planted_faults_are_seen_through_the_loop(name, fault, monkeypatch):
    drafter = next(drafter for drafter in DRAFTERS if drafter.name == name)
    fault(monkeypatch)
    answers, _, _ = sampled(drafter, **PENALISED)
    assert p_value(answers, expected(**PENALISED)) < SURE
