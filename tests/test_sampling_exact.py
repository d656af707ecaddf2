"""Tree sampling has the target's distribution: by enumeration, up to rounding, and by drawing, with chi-square.

A world is a target and a drafter whose next-token distributions depend on all tokens so far: one random row for each of
the V**d contexts of depth d. Enumeration runs over every tree that the drafter can draw and every way the walk can end,
and sums the joint distribution of the output's first tokens. Shorter outputs continue with the target's own
distribution, as the next round would by induction.

Shape suffixes: M tree nodes, V vocabulary, R runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from rounding import rounding
from scipy.stats import chisquare
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specvlm.strategies import Sampling, VerifyContext
from specvlm.strategies.verifiers import sampling
from specvlm.strategies.verifiers.sampling import SamplingVerifier, odds
from specvlm.types import DraftTree, TreeShape


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: with thousands of tiny operations a second one only waits, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A probability is a sum over all draws, of products of as many chances as a walk has steps; the widest tree has 6**4 draws.
EXACT = rounding(6**4 + 64, 1.0)

Odds = Callable[[DraftTree, Tensor], tuple[Tensor, Tensor]]
Context = tuple[int, ...]


@dataclass
class World:
    """p[d], q[d]: (V**d, V) distributions after d tokens; q may have another width than p."""

    parents: tuple[int, ...]
    p: list[Tensor]
    q: list[Tensor] | None

    @classmethod
    def random(cls, shape: str, vocab: int, seed: int, q: bool = True, sharp: float = 1.5, length: int = 3) -> World:
        chance = torch.Generator().manual_seed(seed)
        parents = TreeShape.parse(shape).parents
        tables = [
            [(torch.randn(vocab**d, vocab, dtype=torch.float64, generator=chance) * sharp).softmax(-1) for d in range(length)]
            for _ in "pq"
        ]
        return cls(parents, tables[0], tables[1] if q else None)

    @property
    def vocab(self) -> int:
        return self.p[0].shape[-1]

    @property
    def children(self) -> tuple[tuple[int, ...], ...]:
        return TreeShape(self.parents, (0,) * len(self.parents)).children

    def after(self, table: list[Tensor], context: Context) -> Tensor:
        """Return the row of a context; ids unknown to the target share the row of id 0, since no run gets there."""
        row = 0
        for token in context:
            row = row * self.vocab + (token if token < self.vocab else 0)
        return table[len(context)][row]

    def contexts(self, tokens: list[int]) -> list[Context]:
        contexts: list[Context] = [()]
        for node in range(1, len(self.parents)):
            contexts.append((*contexts[self.parents[node]], tokens[node]))
        return contexts

    def tree(self, tokens: list[int]) -> tuple[DraftTree, Tensor]:
        contexts = self.contexts(tokens)
        q_MV = None if self.q is None else torch.stack([self.after(self.q, c) for c in contexts])
        return DraftTree(torch.tensor(tokens), self.parents, q_MV), torch.stack([self.after(self.p, c) for c in contexts])

    def draws(self) -> Iterator[tuple[list[int], float]]:
        """Yield every tree of the drafter with its probability; with q used up, take the highest ids left."""

        def grow(node: int, tokens: list[int], weight: float) -> Iterator[tuple[list[int], float]]:
            if node == len(self.parents):
                yield tokens, weight
                return
            parent = self.parents[node]
            earlier = [tokens[sibling] for sibling in self.children[parent] if sibling < node]
            q_V = self.after(self.q, self.contexts_of(tokens, parent)).clone()
            q_V[earlier] = 0.0
            if q_V.sum() == 0:
                left = max(set(range(len(q_V))) - set(earlier), default=0)
                yield from grow(node + 1, [*tokens, left], weight)
                return
            for token, chance in enumerate((q_V / q_V.sum()).tolist()):
                if chance > 0:
                    yield from grow(node + 1, [*tokens, token], weight * chance)

        yield from grow(1, [0], 1.0)

    def contexts_of(self, tokens: list[int], node: int) -> Context:
        path: list[int] = []
        while node:
            path.insert(0, tokens[node])
            node = self.parents[node]
        return tuple(path)

    def target(self) -> Tensor:
        """Compute the target's joint distribution of the first tokens, (V,) * length."""
        return self.onward((), torch.ones(1, dtype=torch.float64))

    def onward(self, context: Context, weights: Tensor) -> Tensor:
        """Spread weights (1,), or (V,) over the next token of `context`, over all continuations of the target."""
        given = len(context) + (len(weights) > 1)
        joint = weights.clone()
        for depth in range(given, len(self.p)):
            row = 0
            for token in context:
                row = row * self.vocab + token
            below = self.vocab ** (depth - len(context))
            joint = (joint[:, None] * self.p[depth][row * below : (row + 1) * below]).flatten()
        return joint

    def output(self, rule: Odds = odds, trees: list[list[int]] | None = None) -> Tensor:
        """Compute the joint distribution of the output's first tokens by `rule`, over all draws or for given trees."""
        joint = torch.zeros(self.vocab ** len(self.p), dtype=torch.float64)
        draws = self.draws() if trees is None else ((tokens, 1 / len(trees)) for tokens in trees)
        for tokens, weight in draws:
            tree, p_MV = self.tree(tokens)
            accept_M, rest_MV = rule(tree, p_MV)
            accept, stack = accept_M.tolist(), [(0, weight)]
            while stack:
                node, reach = stack.pop()
                for child in self.children[node]:
                    stack.append((child, reach * accept[child]))
                    reach *= 1 - accept[child]
                if reach > 0:
                    self._add(joint, self.contexts_of(tokens, node), reach * rest_MV[node])
        return joint

    def _add(self, joint: Tensor, context: Context, weights_V: Tensor) -> None:
        if len(context) >= len(self.p):  # longer than what is compared
            raise AssertionError("the world is too short for this tree")
        spread = self.onward(context, weights_V)
        start = 0
        for token in context:
            assert token < self.vocab, "a token was accepted that the target does not have"
            start = start * self.vocab + token
        joint[start * len(spread) : (start + 1) * len(spread)] += spread


def naive_odds(tree: DraftTree, p_MV: Tensor, fault: str = "") -> tuple[Tensor, Tensor]:
    """The rule of the docstring, token by token on the host, with one of several faults planted."""
    count, vocab = p_MV.shape
    accept, rest = [1.0] * count, (p_MV / p_MV.sum(-1, keepdim=True)).tolist()
    children = TreeShape(tree.parents, (0,) * count).children
    tokens = tree.tokens.tolist()
    for node in range(count):
        p = rest[node]
        q = None if tree.q is None else tree.q[node].tolist()
        for child in children[node]:
            x = tokens[child]
            drawn = q is not None and x < len(q) and q[x] > 0
            if drawn:
                mass = 1.0 if fault == "q is not normalised again" else sum(q)
                law = [value / mass for value in q] + [0.0] * (vocab - len(q))
            else:
                law = [float(token == x) for token in range(max(vocab, x + 1))]
            px = p[x] if x < vocab else 0.0
            accept[child] = min(1.0, px if fault == "accepts with p" else px / law[x])
            if fault == "residual takes out x only":
                left = [0.0 if token == x else p[token] for token in range(vocab)]
            elif fault == "p is left as it was":
                left = p
            else:
                left = [max(p[token] - law[token], 0.0) for token in range(vocab)]
            if sum(left) > 0:
                p = [value / sum(left) for value in left]
            else:
                accept[child] = 1.0
            if drawn and fault != "x stays in q":
                q[x] = 0.0
        rest[node] = p if fault != "bonus from p, not from the residual" else p_MV[node].tolist()
    return torch.tensor(accept, dtype=torch.float64), torch.tensor(rest, dtype=torch.float64)


FAULTS = [
    "x stays in q",
    "q is not normalised again",
    "p is left as it was",
    "residual takes out x only",
    "accepts with p",
    "bonus from p, not from the residual",
]


def distance(world: World, rule: Odds = odds, trees: list[list[int]] | None = None) -> float:
    output = world.output(rule, trees)
    assert abs(output.sum().item() - 1) < EXACT
    return (output - world.target()).abs().max().item()


WORLDS = {
    "one guess": World.random("chain:1", 5, 0),
    "chain": World.random("chain:3", 3, 1, length=4),
    "wide": World.random("3", 5, 2, length=2),
    "as wide as the vocabulary": World.random("3", 3, 3, length=2),
    "tree": World.random("2x2", 3, 4),
    "uneven tree": World.random("[[0],[1],[2],[0,0],[1,0],[1,1],[1,0,0]]", 3, 5, length=4),
    "sharp and far apart": World.random("2x2", 3, 6, sharp=6.0),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_output_has_the_targets_joint_distribution_when_children_are_drawn(world):
    assert distance(world) < EXACT


@pytest.mark.parametrize("fault", FAULTS)
def test_enumeration_catches_planted_faults(fault):
    def faulty(tree: DraftTree, p_MV: Tensor) -> tuple[Tensor, Tensor]:
        return naive_odds(tree, p_MV, fault)

    for name in ["tree", "wide"]:
        assert distance(WORLDS[name], naive_odds) < EXACT
        assert distance(WORLDS[name], faulty) > 1e-3


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_vectorised_odds_equal_the_naive_ones(world):
    for tokens, _ in itertools.islice(world.draws(), 0, None, 7):
        for got, want in zip(odds(*world.tree(tokens)), naive_odds(*world.tree(tokens)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("shape", ["chain:2", "4", "3x2"])
@pytest.mark.parametrize("seed", range(3))
def test_output_has_the_targets_joint_distribution_for_fixed_trees_with_twins(shape, seed):
    world = World.random(shape, 3, seed, q=False)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(10):
        tokens = torch.randint(3, (len(world.parents),), generator=chance).tolist()
        assert distance(world, trees=[tokens]) < EXACT


def zeroed(rows: list[Tensor], ids: list[int]) -> list[Tensor]:
    rows = [row.clone() for row in rows]
    for row in rows:
        row[:, ids] = 0.0
    return [row / row.sum(-1, keepdim=True) for row in rows]


def test_output_is_exact_where_p_and_q_have_different_zeros():
    world = World.random("3x1", 4, 7)
    p, q = zeroed(world.p, [0]), zeroed(world.q, [3])
    assert distance(World(world.parents, p, q)) < EXACT
    assert distance(World(world.parents, p, zeroed(world.q, [1, 2, 3]))) < EXACT  # q gives what p never does, then nothing


def test_output_is_exact_when_q_runs_out_and_the_drafter_fills_up():
    world = World.random("3x2", 3, 8)
    assert distance(World(world.parents, world.p, zeroed(world.q, [1]))) < EXACT


def test_output_is_exact_with_a_smaller_draft_vocabulary():
    world = World.random("2x2", 4, 9)
    assert distance(World(world.parents, world.p, [row[:, :3] / row[:, :3].sum(-1, keepdim=True) for row in world.q])) < EXACT


def test_output_is_exact_with_a_larger_draft_vocabulary():
    world = World.random("2x1", 3, 10)
    chance = torch.Generator().manual_seed(0)
    q = [torch.rand(len(row), 5, dtype=torch.float64, generator=chance) for row in world.q]
    assert distance(World(world.parents, world.p, [row / row.sum(-1, keepdim=True) for row in q])) < EXACT


def test_a_drafter_equal_to_the_target_is_always_accepted():
    world = World.random("2x2", 3, 11)
    for tokens, _ in world.draws():
        tree, p_MV = World(world.parents, world.p, world.p).tree(tokens)
        accept = odds(tree, p_MV)[0]
        first_children = [below[0] for below in world.children if below]
        assert accept[first_children].min() > 1 - EXACT
    assert distance(World(world.parents, world.p, world.p)) < EXACT


def test_a_certain_target_is_exact():
    world = World.random("2x2", 3, 12)
    assert distance(World(world.parents, zeroed(world.p, [0, 2]), world.q)) < EXACT


def test_ids_beyond_both_vocabularies_are_rejected_and_change_nothing():
    for q in [None, torch.full((3, 2), 0.5)]:
        p_MV = torch.tensor([[0.5, 0.3, 0.2]]).double().expand(3, -1)
        accept, rest = odds(DraftTree(torch.tensor([0, 1000, 1000]), (-1, 0, 0), q), p_MV)
        assert accept.tolist() == [1.0, 0.0, 0.0]
        torch.testing.assert_close(rest, p_MV, rtol=0, atol=rounding(3, 1.0, torch.float32))  # written down in float32


# --- by drawing -------------------------------------------------------------------------------------------------------

RUNS = 20_000


@dataclass
class Draws:
    """Runs of one world all at once: copies of the tree form a forest, which the rule treats node by node."""

    shape: str
    vocab: int
    sampling: Sampling
    length: int = 3
    drawn: bool = True

    def tables(self, seed: int) -> list[Tensor]:
        chance = torch.Generator().manual_seed(seed)
        return [1.5 * torch.randn(self.vocab**d, self.vocab, generator=chance) for d in range(self.length)]

    @property
    def parents(self) -> tuple[int, ...]:
        return TreeShape.parse(self.shape).parents

    def propose(self, runs: int, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return tokens (R, M), contexts (R, M) as row numbers, target logits and the drafter's q, both (R, M, V)."""
        shape = TreeShape.parse(self.shape)
        target, draft = self.tables(100), self.tables(200)
        tokens = torch.zeros(runs, len(shape), dtype=torch.int64)
        context, logits, q = (
            tokens.clone(),
            torch.zeros(runs, len(shape), self.vocab),
            torch.zeros(runs, len(shape), self.vocab),
        )
        for node, depth in enumerate(shape.depths):
            logits[:, node] = target[depth][context[:, node]]
            q[:, node] = self.sampling.probabilities(draft[depth][context[:, node]])
            below = list(shape.children[node])
            if below:
                if self.drawn:  # an exponential race: in order and without replacement
                    race = q[:, node] / torch.empty(runs, self.vocab).exponential_(generator=chance)
                    tokens[:, below] = race.topk(len(below)).indices
                else:
                    tokens[:, below] = q[:, node].topk(len(below)).indices
                context[:, below] = context[:, [node]] * self.vocab + tokens[:, below]
        return tokens, context, logits, q if self.drawn else None

    def counts(self, runs: int, seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        tokens, context, logits, q = self.propose(runs, chance)
        size, parents = len(self.parents), forest_of(self.parents, runs)
        forest = DraftTree(tokens.flatten(), parents, None if q is None else q.flatten(0, 1))
        p_MV = self.sampling.probabilities(logits.flatten(0, 1)).double()
        accept_M, rest_MV = sampling.odds(forest, p_MV)
        dice = torch.rand(2 * len(parents), generator=chance, dtype=torch.float64)
        next_M, bonus_M = sampling._decide(forest, accept_M, rest_MV, dice)
        last_R = torch.arange(runs) * size
        while bool((next_M[last_R] > 0).any()):
            last_R = torch.where(next_M[last_R] > 0, next_M[last_R], last_R)
        depth_R = torch.tensor(TreeShape.parse(self.shape).depths)[last_R % size] + 1
        outcome_R = context.flatten()[last_R] * self.vocab + bonus_M[last_R]
        for depth in range(1, self.length):  # what later rounds would add
            p = self.sampling.probabilities(self.tables(100)[depth])
            short = depth_R == depth
            if bool(short.any()):
                outcome_R[short] = (
                    outcome_R[short] * self.vocab + torch.multinomial(p[outcome_R[short]], 1, generator=chance)[:, 0]
                )
                depth_R[short] += 1
        return outcome_R.bincount(minlength=self.vocab**self.length)

    def expected(self) -> Tensor:
        joint = torch.ones(1, dtype=torch.float64)
        for table in self.tables(100):
            joint = (joint[:, None] * self.sampling.probabilities(table).double()).flatten()
        return joint


@cache
def forest_of(parents: tuple[int, ...], runs: int) -> tuple[int, ...]:
    size = len(parents)
    return tuple(parent if parent < 0 else run * size + parent for run in range(runs) for parent in parents)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the p-value; impossible cells must be empty, and cells of fewer than five expected runs are pooled."""
    runs, expected = counts.sum(), expected / expected.sum()
    assert counts[expected == 0].sum() == 0
    common = expected * runs >= 5
    seen = [*counts[common].tolist(), counts[~common].sum().item()]
    hoped = [*(expected[common] * runs).tolist(), (expected[~common].sum() * runs).item()]
    if hoped[-1] < 5:
        seen[-2:], hoped[-2:] = [sum(seen[-2:])], [sum(hoped[-2:])]
    return float(chisquare(seen, hoped).pvalue)


PLAIN, WARPED = Sampling(1.0), Sampling(0.7, top_p=0.9)
SETTINGS = [
    Draws(shape, vocab, how, length, drawn)
    for shape, vocab, length in [("chain:2", 4, 3), ("2x2", 4, 3), ("4", 5, 2), ("[[0],[1],[2],[0,0],[2,0],[2,1]]", 4, 3)]
    for how in [PLAIN, WARPED, Sampling(1.3, top_k=3)]
    for drawn in [True, False]
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_drawn_output_has_the_targets_joint_distribution(setting):
    assert chi_square(setting.counts(RUNS, 1), setting.expected()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "last accepted child wins"])
def test_chi_square_catches_planted_faults(fault, monkeypatch):
    """The vectorised rule with one line broken fails the same check as above."""
    try_child, turns = sampling._try, sampling._trials

    def left_with(p_nV: Tensor, accept_n: Tensor, left_nV: Tensor) -> tuple[Tensor, Tensor]:
        mass_n1 = left_nV.sum(-1, keepdim=True)
        return accept_n, torch.where(mass_n1 > 0, left_nV / mass_n1, p_nV)

    def broken_try(x_n1: Tensor, p_nV: Tensor, q_nV: Tensor) -> tuple[Tensor, Tensor]:
        accept_n, rest_nV = try_child(x_n1, p_nV, q_nV)
        if fault == "p is left as it was":
            return accept_n, p_nV
        if fault == "residual takes out x only":
            return left_with(p_nV, accept_n, p_nV.scatter(-1, x_n1, 0.0))
        if fault == "accepts with p":
            return p_nV.gather(-1, x_n1)[:, 0], rest_nV
        return accept_n, rest_nV

    def naive_forest(tree: DraftTree, p_MV: Tensor) -> tuple[Tensor, Tensor]:
        size = len(setting.parents)
        parts = []
        for at in range(0, len(tree), size):
            part = slice(at, at + size)
            parts.append(naive_odds(DraftTree(tree.tokens[part], setting.parents, tree.q[part]), p_MV[part], fault))
        return torch.cat([a for a, _ in parts]), torch.cat([r for _, r in parts])

    setting, runs = Draws("2x2", 4, PLAIN), RUNS
    if fault in ("p is left as it was", "residual takes out x only", "accepts with p"):
        monkeypatch.setattr(sampling, "_try", broken_try)
    elif fault == "last accepted child wins":
        decide = sampling._decide

        def backwards(tree, accept_M, rest_MV, dice):
            monkeypatch.setattr(sampling, "_trials", lambda *shape: tuple(reversed(turns(*shape))))
            return decide(tree, accept_M, rest_MV, dice)

        monkeypatch.setattr(sampling, "_decide", backwards)
    else:
        runs = 10_000
        monkeypatch.setattr(sampling, "odds", naive_forest)
    assert chi_square(setting.counts(runs, 1), setting.expected()) < 1e-6


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting.sampling == WARPED], ids=str)
def test_a_verdict_is_what_the_forest_decides_for_its_tree(setting):
    """So what holds for the counts above holds for `verify`."""
    verifier = SamplingVerifier(0.7, top_p=0.9)
    tokens, _, logits, q = setting.propose(100, torch.Generator().manual_seed(3))
    for run in range(100):
        tree = DraftTree(tokens[run], setting.parents, None if q is None else q[run])
        verdict = verifier.verify(VerifyContext(tree, logits[run], torch.Generator().manual_seed(run)))
        dice = torch.rand(2 * len(tree), generator=torch.Generator().manual_seed(run), dtype=torch.float64)
        p_MV = setting.sampling.probabilities(logits[run]).double()
        next_M, bonus_M = sampling._decide(tree, *sampling.odds(tree, p_MV), dice)
        for node, following in itertools.pairwise([*verdict.path, 0]):
            assert next_M[node] == following
        assert bonus_M[verdict.path[-1]] == verdict.bonus


@pytest.mark.slow
def test_rounds_in_a_row_have_the_targets_joint_distribution():
    """`first`, then `verify` and `first` again, run by run, with one generator throughout as in a request."""
    setting, runs = Draws("chain:1", 3, WARPED), 2_000
    verifier, chance = SamplingVerifier(0.7, top_p=0.9), torch.Generator().manual_seed(3)
    target, counts = setting.tables(100), torch.zeros(3**3, dtype=torch.int64)
    q = setting.sampling.probabilities(setting.tables(200)[1])
    for _ in range(runs):
        root = verifier.first(target[0][0], chance)
        guess = int(torch.multinomial(q[root], 1, generator=chance))
        tree = DraftTree(torch.tensor([root, guess]), setting.parents, q[[root, root]])
        logits = torch.stack([target[1][root], target[2][root * 3 + guess]])
        verdict = verifier.verify(VerifyContext(tree, logits, chance))
        second = guess if verdict.accepted else verdict.bonus
        third = verdict.bonus if verdict.accepted else verifier.first(target[2][root * 3 + second], chance)
        counts[root * 9 + second * 3 + third] += 1
    assert chi_square(counts, setting.expected()) > 1e-3


@pytest.mark.slow
def test_first_draws_from_the_warped_distribution():
    logits_V = torch.randn(6, generator=torch.Generator().manual_seed(4))
    chance = torch.Generator().manual_seed(5)
    verifier = SamplingVerifier(0.7, top_k=4, top_p=0.9)
    counts = torch.tensor([verifier.first(logits_V, chance) for _ in range(3_000)]).bincount(minlength=6)
    assert chi_square(counts, verifier.sampling.probabilities(logits_V).double()) > 1e-3


def test_a_draw_never_gives_a_token_of_probability_zero():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for uniform, token in [(0.0, 1), (0.25 - 1e-16, 1), (0.25, 3), (1 - 2**-53, 3), (1.0, 3)]:
        assert sampling._draw(p, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


# --- the warped distribution itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "temperature, top_k, top_p", list(itertools.product([0.3, 0.7, 1.0, 2.0], [0, 1, 5, 1000], [0.1, 0.9, 1.0]))
)
def test_probabilities_equal_hugging_faces_warpers(temperature, top_k, top_p, dtype, ties):
    logits = 3 * torch.randn(26, 40, generator=torch.Generator().manual_seed(6))
    logits = (logits.round() if ties else logits).to(dtype)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    rule = Sampling(temperature, top_k, top_p)
    whole = rule.probabilities(logits)
    assert torch.equal(whole, warpers(None, logits.float()).softmax(-1))
    for row in range(26):  # a row alone, as in the autoregressive path, keeps the same tokens, ties included
        alone = rule.probabilities(logits[row])
        assert torch.equal(alone > 0, whole[row] > 0)
        torch.testing.assert_close(alone, whole[row], rtol=rounding(2 * 40, 1.0, torch.float32), atol=0)  # both normalised


def test_probabilities_refuse_temperature_zero():
    with pytest.raises(ValueError, match="0 is greedy"):
        Sampling().probabilities(torch.zeros(3))
