"""Sampling through the whole loop: the first three tokens are distributed as the target's own, whatever drafts them."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from scipy.stats import chisquare

from specvlm.drafters.self_draft import SelfDrafter
from specvlm.drafters.tree import TreeDrafter
from specvlm.graph import DecodingGraph, autoregressive
from specvlm.metrics import tokens_of
from specvlm.pruners.uniform import UniformPruner
from specvlm.strategy import Sampling
from specvlm.verifiers.sampling import SamplingVerifier

RUNS, LENGTH, FAMILY = 400, 3, "llava_onevision"
WARPS = [dict(temperature=1.0, top_k=4), dict(temperature=0.7, top_k=6, top_p=0.9)]


def request():
    lm = tiny.model(FAMILY)
    grid, video = tiny.video(FAMILY, frames=1)
    return lm.expand([5, tiny.VIDEO, 7, 8], [grid], [video])


@torch.inference_mode()
def expected(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every answer of three tokens, one forward pass at a time."""
    lm, prompt = tiny.model(FAMILY), request()

    def following(tokens):
        cache = lm.new_cache(len(prompt) + LENGTH)
        logits = lm.head(lm.prefill(lm.embed(prompt, lm.features(prompt)), lm.positions(prompt), cache, prompt.cut))
        for token in tokens:
            logits = lm.append(torch.tensor([token]), [0], None, cache)[0]
        p = sampling.probabilities(logits)
        return {int(token): float(p[token]) for token in p.nonzero().flatten()}

    table = {(): 1.0}
    for _ in range(LENGTH):
        table = {(*t, token): p * q for t, p in table.items() for token, q in following(t).items()}
    return table


def p_value(answers: list[tuple[int, ...]], table: dict[tuple[int, ...], float]) -> float:
    assert set(answers) <= set(table), "an answer the target cannot give"
    counts = {answer: len(list(group)) for answer, group in itertools.groupby(sorted(answers))}
    # Cells of fewer than five expected go together, or the statistic is not chi-square distributed.
    large = [answer for answer, p in table.items() if p * len(answers) >= 5]
    seen, wanted = [counts.get(a, 0) for a in large], [table[a] * len(answers) for a in large]
    seen.append(len(answers) - sum(seen)), wanted.append(len(answers) - sum(wanted))
    return chisquare(seen, wanted).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("warp", WARPS, ids=str)
@pytest.mark.parametrize(
    "drafter",
    [TreeDrafter("2x2"), TreeDrafter("2x2", children="top"), TreeDrafter("chain:2"), SelfDrafter("2x1")],
    ids=repr,
)
def test_tree_chain_and_self_sample_as_the_target_does(drafter, warp):
    verifier, prompt = SamplingVerifier(**warp), request()
    table = expected(verifier.sampling)
    graph = DecodingGraph(tiny.model(FAMILY), tiny.draft_of(FAMILY, noise=0.1), UniformPruner(), drafter, verifier, 0.5)
    answers = []
    for seed in range(RUNS):
        graph.seed = seed
        answers.append(tuple(tokens_of(list(graph.decode(prompt, LENGTH)))))
    assert p_value(answers, table) > 1e-3


@pytest.mark.slow
def test_a_wrong_temperature_would_be_seen():
    prompt, verifier = request(), SamplingVerifier(temperature=0.6, top_k=4)
    answers = [
        tuple(tokens_of(list(autoregressive(tiny.model(FAMILY), prompt, LENGTH, verifier, seed)))) for seed in range(RUNS)
    ]
    assert p_value(answers, expected(verifier.sampling)) > 1e-3
    assert p_value(answers, expected(Sampling(temperature=1.0, top_k=4))) < 1e-6
