"""Loose verification: strict at zero, the hand-made walk, and its label."""

from __future__ import annotations

import pytest
import tiny
import torch
from rounding import rounding
from test_verifiers import naive_greedy, random_parents

from specvlm.drafters.tree import TreeDrafter
from specvlm.engine import Engine
from specvlm.engine.graphs import GraphsEngine
from specvlm.graph import DecodingGraph
from specvlm.metrics import acceptance_of, tokens_of
from specvlm.pruners.uniform import UniformPruner
from specvlm.strategy import VerifyContext
from specvlm.types import DraftTree
from specvlm.verifiers.loose import LooseVerifier, visual_scores

V = 12
CHAIN = (-1, 0, 1, 2, 3)


def verdict(verifier, tokens, parents, best, scores=None):
    """best: the target's choice behind each node. scores: cosine of each node to the only video token."""
    logits = torch.zeros(len(parents), V)
    logits[torch.arange(len(parents)), torch.tensor(best)] = 1.0
    hidden = video = None
    if scores is not None:
        cos = torch.tensor(scores)
        hidden, video = torch.stack([cos, (1 - cos**2).sqrt()], 1) * 3, torch.tensor([[1.0, 0.0]])
    ctx = VerifyContext(DraftTree(torch.tensor(tokens), parents), logits, torch.Generator(), hidden_MD=hidden, video_ND=video)
    return verifier.verify(ctx)


def test_nothing_relaxed_is_greedy():
    chance, strict = torch.Generator().manual_seed(0), LooseVerifier(relaxed=0.0, window=0)
    for size in [1, 2, 5, 12] * 40:
        parents = random_parents(size, chance)
        tokens = torch.randperm(V, generator=chance)[:size].tolist()  # no twins, between which greedy takes the deeper
        logits = torch.randn(size, V, generator=chance)
        got = strict.verify(VerifyContext(DraftTree(torch.tensor(tokens), parents), logits, chance))
        assert (got.path, got.bonus) == naive_greedy(tokens, parents, logits.tolist())


def test_anchors_must_match_and_others_need_not():
    half = LooseVerifier(relaxed=0.5, nearest=1, window=0)
    tokens, best = [0, 1, 2, 3, 4], [9, 9, 9, 9, 9]
    assert verdict(half, tokens, CHAIN, best, [0.0, 0.1, 0.2, 0.8, 0.9]).path == (0, 1, 2)
    assert verdict(half, tokens, CHAIN, best, [0.0, 0.8, 0.2, 0.1, 0.9]).path == (0,)
    assert verdict(half, tokens, CHAIN, [1, 9, 9, 4, 5], [0.0, 0.8, 0.2, 0.1, 0.9]).path == (0, 1, 2, 3, 4)
    assert verdict(LooseVerifier(relaxed=1.0, window=0), tokens, CHAIN, best, [0.0] * 5).path == (0, 1, 2, 3, 4)


def test_a_match_goes_before_a_relaxed_first_child():
    loose = LooseVerifier(relaxed=1.0, window=0)
    assert verdict(loose, [0, 1, 2], (-1, 0, 0), [2, 7, 8], [0.0] * 3).path == (0, 2)
    assert verdict(loose, [0, 1, 2], (-1, 0, 0), [5, 7, 8], [0.0] * 3).path == (0, 1)


@pytest.mark.parametrize(("window", "path"), [(0, (0,)), (1, (0, 1)), (2, (0, 1))])
def test_a_token_that_the_target_wants_a_little_later_passes(window, path):
    strict = LooseVerifier(relaxed=0.0, window=window)
    got = verdict(strict, [0, 1, 2, 3, 4], CHAIN, [9, 1, 9, 9, 9])  # the target wants 1 one position later
    assert got.path == path


def test_a_token_wanted_outside_of_the_window_does_not_pass():
    assert verdict(LooseVerifier(relaxed=0.0, window=2), [0, 1, 2, 3, 4], CHAIN, [9, 8, 8, 1, 9]).path == (0,)
    assert verdict(LooseVerifier(relaxed=0.0, window=3), [0, 1, 2, 3, 4], CHAIN, [9, 8, 8, 1, 9]).path == (0, 1)


def test_scores_are_the_mean_of_the_nearest_cosines():
    hidden, video = torch.randn(4, 8), torch.nn.functional.normalize(torch.randn(30, 8), dim=-1)
    for row, score in zip(hidden, visual_scores(hidden, video, 10), strict=True):
        cosines = sorted((float(torch.cosine_similarity(row, v, dim=0)) for v in video), reverse=True)
        assert float(score) == pytest.approx(sum(cosines[:10]) / 10, abs=rounding(10 + 3 * 8, 1.0, torch.float32))
    assert visual_scores(hidden, video[:3], 10).shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
def test_a_run_is_relaxed_by_what_the_models_hidden_states_say(family, engine):
    request = tiny.prompt(family)

    def steps(verifier):
        drafter = TreeDrafter("chain:10")
        graph = DecodingGraph(tiny.model(family), tiny.draft_of(family), UniformPruner(), drafter, verifier, 0.9, engine=engine)
        return list(graph.decode(request, 40))

    strict, loose, all_of_it = steps(LooseVerifier(0.0, window=0)), steps(LooseVerifier()), steps(LooseVerifier(1.0))
    assert tokens_of(strict) == tiny.hf_greedy(tiny.model(family), request, 40)
    accepted = [acceptance_of(found)["accepted_per_round"] for found in (strict, loose, all_of_it)]
    assert accepted[0] < accepted[1] <= accepted[2] == 10.0
    assert tokens_of(loose) != tokens_of(strict)


def test_it_says_that_it_is_lossy():
    assert LooseVerifier.lossless is False and "Lossy" in __import__("specvlm.verifiers.loose").verifiers.loose.__doc__


@pytest.mark.parametrize("fields", [dict(relaxed=-0.1), dict(relaxed=1.1), dict(nearest=0), dict(window=-1)])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match="relaxed must|nearest must"):
        LooseVerifier(**fields)
