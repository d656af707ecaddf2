"""Loose verification: strict at zero, a hand-made walk, and its label."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from types import SimpleNamespace

import pytest
import tiny
import torch
from campaign import lossy_stops
from rounding import rounding
from test_verifiers import naive_greedy, random_parents

from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.engine.base import Request, first_token, strict_ends
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.parallel.ranks import SINGLE
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies import Sampling, Verifier, VerifyContext
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.loose import LooseVerifier, visual_scores
from specvlm.types import DraftTree, GenerationOptions, Verdict

V = 12
CHAIN = (-1, 0, 1, 2, 3)


def verdict(verifier, tokens, parents, best, scores=None):
    """Verify a tree. best: the target's choice after each node. scores: cosine of each node to the only video token."""
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


@pytest.mark.parametrize(("relaxed", "guesses", "count"), [(0.7, 90, 63), (0.29, 100, 29), (0.07, 100, 7), (0.57, 100, 57)])
def test_the_share_of_relaxed_guesses_is_that_of_the_number_as_written(relaxed, guesses, count):
    """A chain of fillers of rising relevance, where the target prefers other tokens."""
    tokens, scores = [0] + [1] * guesses, [0.0, *(at / guesses for at in range(guesses))]
    rule = LooseVerifier(relaxed=relaxed, nearest=1, window=0)
    assert len(verdict(rule, tokens, tuple(range(-1, guesses)), [9] * (guesses + 1), scores).path) == 1 + count


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
        graph = DecodingGraph(
            tiny.model(family),
            tiny.draft_of(family),
            UniformPruner(),
            drafter,
            verifier,
            GenerationOptions(ratio=0.9),
            engine=engine,
        )
        return list(graph.decode(request, 40))

    strict, loose, all_of_it = steps(LooseVerifier(0.0, window=0)), steps(LooseVerifier()), steps(LooseVerifier(1.0))
    assert tokens_of(strict) == tiny.hf_greedy(tiny.model(family), request, 40)
    accepted = [acceptance_of(found)["accepted_per_round"] for found in (strict, loose, all_of_it)]
    assert accepted[0] < accepted[1] <= accepted[2] == 10.0
    assert tokens_of(loose) != tokens_of(strict)


# ---- LVSpec, from the paper's words -----------------------------------------------------------------------------------


def lvspec(tokens, parents, best, hidden, video, relaxed, nearest, window):
    """The path that loose verification takes, in plain Python, node by node."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    scores = {}
    for node in range(1, len(tokens)):
        near = sorted((cosine(hidden[node], state) for state in video), reverse=True)[:nearest]
        scores[node] = sum(near) / len(near)
    fillers = sorted(scores, key=lambda node: (scores[node], node))[: math.floor(Fraction(str(relaxed)) * len(scores))]
    path = [0]
    while below := [node for node, parent in enumerate(parents) if parent == path[-1]]:
        wanted = [node for node in below if tokens[node] == best[path[-1]]]
        ahead, line = below[0], []
        while ahead is not None:
            line.append(ahead)
            ahead = next((node for node, parent in enumerate(parents) if parent == ahead), None)
        choices = [best[node] for node in [*path, *line]]  # by position: choice i is for position i + 1
        at = len(path) - 1
        shifted = window and tokens[below[0]] in choices[max(0, at - window) : at + window + 1]
        if wanted:
            path.append(wanted[0])
        elif below[0] in fillers or shifted:
            path.append(below[0])
        else:
            break
    return tuple(path)


@pytest.mark.parametrize("seed", range(60))
def test_the_walk_is_lvspecs(seed):
    chance = random.Random(seed)
    size, frames, nearest, window = (
        chance.choice((1, 2, 6, 11, 26)),
        chance.choice((1, 2, 30)),
        chance.choice((1, 3, 10)),
        seed % 4,
    )
    relaxed = chance.choice((0.0, 0.3, 0.7, 1.0))
    parents = random_parents(size, torch.Generator().manual_seed(seed), chain=chance.choice((0.5, 1.0)))
    tokens, best = ([chance.randrange(V) for _ in range(size)] for _ in "ab")
    for node, parent in enumerate(parents[1:], start=1):
        if chance.random() < 0.4:
            best[parent] = tokens[node]
    # Of length 2, so that every cosine is exact: scores are equal, or far apart.
    states = [[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [1, -1, 1, -1], [2, 0, 0, 0], [0, 0, -2, 0], [-1, -1, -1, -1]]
    hidden, video = [chance.choice(states) for _ in range(size)], [chance.choice(states) for _ in range(frames)]
    logits = torch.zeros(size, V).scatter(1, torch.tensor(best)[:, None], 1.0)
    rows, unit = torch.tensor(hidden, dtype=torch.float32), torch.tensor(video, dtype=torch.float32) / 2
    tree = DraftTree(torch.tensor(tokens), parents)
    ctx = VerifyContext(tree, logits, torch.Generator(), hidden_MD=rows, video_ND=unit)
    got = LooseVerifier(relaxed, nearest, window).verify(ctx)
    scores = visual_scores(rows, unit, nearest)[1:].double()
    gaps = (scores[:, None] - scores).abs()
    assert not ((gaps > 0) & (gaps < 1e-3)).any(), "equal scores must be equal bits"
    assert got.path == lvspec(tokens, parents, best, hidden, video, relaxed, nearest, window)
    assert got.bonus == best[got.path[-1]]


# ---- where an answer ends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything(Verifier):
    """Accepts every first guess; its bonus is not the target's choice either."""

    name = "everything"
    lossless = False
    temperature: float = 0.0
    bonus: int = 3

    @property
    def sampling(self):
        return Sampling(self.temperature)

    def first(self, logits_V, generator):
        if not self.temperature:
            return self.bonus
        return int(torch.multinomial(self.sampling.probabilities(logits_V), 1, generator=generator))

    def verify(self, ctx):
        last = 0
        while last in ctx.tree.parents:
            last = ctx.tree.parents.index(last)
        return Verdict(ctx.tree.way_to(last), self.bonus)


def checked_by(verifier, tokens, best, stops, scale=1.0, generator=None):
    """Apply `strict_ends` to a chain that a rule accepted in full."""
    tree = DraftTree(torch.tensor(tokens), tuple(range(-1, len(tokens) - 1)))
    logits = torch.zeros(len(tokens), V).scatter(1, torch.tensor(best)[:, None], scale)
    generator = generator or torch.Generator().manual_seed(0)
    request = Request(None, None, verifier, verifier.sampling, None, generator, stops, lossless=False)
    return strict_ends(request, verifier.verify(VerifyContext(tree, logits, generator)), tree, logits, 1)


@pytest.mark.parametrize(
    ("tokens", "best", "path", "bonus"),
    [
        ([0, 1, 2, 4], [5, 5, 5, 5], (0, 1, 2, 3), 3),  # no stop id anywhere: the rule's own affair
        ([0, 1, 9, 4], [5, 5, 5, 5], (0, 1), 5),  # a guess would end it
        ([0, 1, 2, 4], [5, 9, 5, 5], (0, 1), 9),  # a guess would lengthen it
        ([0, 1, 9, 4], [5, 9, 5, 5], (0, 1, 2, 3), 3),  # both want to end it here
        ([0, 1, 9, 4], [5, 8, 5, 5], (0, 1), 8),  # there are two stop ids, and this is the target's
        ([0, 9, 9, 9], [5, 5, 5, 5], (0,), 5),
        ([0, 1, 2, 4], [5, 5, 5, 9], (0, 1, 2, 3), 9),  # the rule's next token would lengthen it
    ],
)
def test_a_path_is_cut_where_a_guess_would_end_the_answer_or_lengthen_it(tokens, best, path, bonus):
    assert checked_by(Everything(), tokens, best, frozenset({8, 9})) == Verdict(path, bonus)
    assert checked_by(Everything(), tokens, best, frozenset()) == Verdict((0, 1, 2, 3), 3)


def test_a_next_token_that_would_end_the_answer_is_the_targets():
    assert checked_by(Everything(bonus=9), [0, 1], [5, 5], frozenset({9})) == Verdict((0, 1), 5)


@pytest.mark.slow
def test_where_the_rule_samples_answers_end_as_often_as_the_targets_own_draws_do():
    """A chain that guesses a stop id: at each node, the answer ends with the target's probability."""
    generator, ends, runs = torch.Generator().manual_seed(0), [0, 0, 0], 1500
    tokens, best, stops = [0, 1, 9, 4], [2, 2, 8, 2], frozenset({8, 9})
    for _ in range(runs):
        got = checked_by(Everything(1.0), tokens, best, stops, 2.0, generator)
        written = [*(tokens[node] for node in got.path[1:]), got.bonus]
        at = next((at for at, token in enumerate(written) if token in stops), None)
        ends[at if at is not None else 2] += 1
        assert at is None or at == len(written) - 1 or written[at] == 9
    likely = 2 / (math.exp(2) + V - 1)  # of either stop id behind the first two nodes
    for count, chance in zip(ends[:2], (likely, (1 - likely) * likely), strict=True):
        assert abs(count - runs * chance) < 6 * math.sqrt(runs * chance)


@dataclass(frozen=True)
class Sloppy(Everything):
    """Never returns a stop id without a draft, and overwrites everything it is given."""

    stops: frozenset[int] = frozenset()
    bonus: int = 3

    def first(self, logits_V, generator):
        logits_V[list(self.stops)] = float("-inf")
        return int(logits_V.argmax())

    def verify(self, ctx):
        ctx.logits_MV[:, list(self.stops)] = float("-inf")
        ctx.tree.tokens.fill_(self.bonus)
        return super().verify(ctx)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_a_rule_writes_into_its_context_moves_no_end(family, monkeypatch):
    target, stops = tiny.model(family), frozenset(range(0, 97, 3))
    monkeypatch.setattr(target, "stop_ids", stops)
    for seed in range(6):
        found = answer(family, Sloppy(stops=stops), Engine(), seed)
        assert not lossy_stops.faults_of(target, tiny.prompt(family, seed), found)


@pytest.mark.slow
def test_a_rule_that_samples_has_no_word_of_its_own_on_where_answers_end():
    """Its `first` never stops. Both stop ids still come as often as the target gives them, and no others do."""
    target, rule = SimpleNamespace(ranks=SINGLE), Sloppy(1.0, stops=frozenset({8, 9}))
    cache = SimpleNamespace(length=0)
    penalty = RepetitionPenalty(1.0, torch.zeros(V, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    request = Request(target, cache, rule, rule.sampling, penalty, generator, frozenset({8, 9}), lossless=False)
    logits_1V, runs = torch.zeros(1, V).index_fill_(1, torch.tensor([2, 8]), 2.0), 1500
    drawn = [first_token(request, logits_1V) for _ in range(runs)]
    for stop, weight in ((8, math.exp(2)), (9, 1.0)):
        chance = weight / (2 * math.exp(2) + V - 2)
        assert abs(drawn.count(stop) - runs * chance) < 6 * math.sqrt(runs * chance)
    assert drawn.count(2) == runs - drawn.count(8) - drawn.count(9)  # the rule's own, where neither stops


def test_every_choice_is_drawn_among_lossy_answers():
    cases = [lossy_stops.drawn(0, number) for number in range(lossy_stops.COUNT)]
    assert {case["family"] for case in cases} == set(tiny.FAMILIES) and {case["rule"] for case in cases} == set(
        lossy_stops.RULES
    )
    assert {case["drafter"] for case in cases} == set(lossy_stops.DRAFTERS)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("engine", [Engine(), GraphsEngine("direct")], ids=["eager", "graphs"])
def test_no_answer_of_a_lossy_rule_ends_or_goes_on_by_a_guess(family, engine, monkeypatch):
    """With every token, or every third, as a stop id, the target's own choice always decides."""
    monkeypatch.setattr(tiny.model(family), "stop_ids", frozenset(range(97)))
    for rule in (LooseVerifier(1.0), Everything()):
        assert answer(family, rule, engine) == tiny.hf_greedy(tiny.model(family), tiny.prompt(family), 1)
    monkeypatch.setattr(tiny.model(family), "stop_ids", frozenset(range(0, 97, 3)))
    for rule in (LooseVerifier(1.0), LooseVerifier(), Everything()):
        for seed in range(6):
            found = answer(family, rule, engine, seed)
            assert not lossy_stops.faults_of(tiny.model(family), tiny.prompt(family, seed), found)


def answer(family, rule, engine, seed=0):
    pair = tiny.model(family), tiny.draft_of(family, 0.1)
    graph = DecodingGraph(*pair, UniformPruner(), TreeDrafter("chain:10"), rule, engine=engine)
    return tokens_of(list(graph.decode(tiny.prompt(family, seed), 20)))


def test_it_says_that_it_is_lossy():
    assert LooseVerifier.lossless is False and "Lossy" in import_module("specvlm.strategies.verifiers.loose").__doc__


@pytest.mark.parametrize("fields", [dict(relaxed=-0.1), dict(relaxed=1.1), dict(nearest=0), dict(window=-1)])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match="relaxed must|nearest must"):
        LooseVerifier(**fields)
