"""Sampling through the whole loop: the first three tokens are distributed as the target's own, whatever drafts them."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import tiny
import torch
from scipy.stats import chisquare

from specvlm.contract.tiny import built
from specvlm.drafters.self_draft import SelfDrafter
from specvlm.drafters.tree import TreeDrafter
from specvlm.graph import DecodingGraph, autoregressive
from specvlm.metrics import tokens_of
from specvlm.models.video_lm import VideoLM
from specvlm.pruners.uniform import UniformPruner
from specvlm.strategy import Sampling
from specvlm.verifiers.sampling import SamplingVerifier

RUNS, LENGTH, FAMILY = 320, 3, "llava_onevision"
LEAST_P = 0.01  # what 320 draws find 9 times in 10 at this level, 400 find as often at 0.001 (noncentral chi-square)
WARPS = [dict(temperature=1.0, top_k=4), dict(temperature=0.7, top_k=6, top_p=0.9)]


@cache
def model(noise: float = 0.0) -> VideoLM:
    """Of one layer: a rule of sampling sees logits alone, so thousands of draws need not come from more. noise: on weights."""
    torch.manual_seed(0)
    hf = built(FAMILY, 97, num_hidden_layers=1).double()
    for weight in hf.parameters():
        weight.data += noise * torch.randn_like(weight)
    return tiny.wrap(hf)


def request():
    lm = model()
    grid, video = tiny.video(FAMILY, frames=1)
    return lm.expand([5, tiny.VIDEO, 7, 8], [grid], [video])


@torch.inference_mode()
def expected(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every answer of three tokens, one forward pass at a time."""
    lm, prompt = model(), request()

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
    graph = DecodingGraph(model(), model(noise=0.1), UniformPruner(), drafter, verifier, 0.5)
    answers = []
    for seed in range(RUNS):
        graph.seed = seed
        answers.append(tuple(tokens_of(list(graph.decode(prompt, LENGTH)))))
    assert p_value(answers, table) > LEAST_P


@pytest.mark.slow
def test_a_wrong_temperature_would_be_seen():
    prompt, verifier = request(), SamplingVerifier(temperature=0.6, top_k=4)
    answers = [tuple(tokens_of(list(autoregressive(model(), prompt, LENGTH, verifier, seed)))) for seed in range(RUNS)]
    assert p_value(answers, expected(verifier.sampling)) > LEAST_P
    assert p_value(answers, expected(Sampling(temperature=1.0, top_k=4))) < 1e-6
