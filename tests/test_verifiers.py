"""Verdicts on invented logits: greedy against a walk in plain Python, and what the sampling verifier refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specvlm.strategies import Verifier, VerifyContext
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import DraftTree, TreeShape

V = 4


def verdict(verifier: Verifier, tokens: Tensor, parents: tuple[int, ...], logits_MV: Tensor, seed: int = 0):
    return verifier.verify(VerifyContext(DraftTree(tokens, parents), logits_MV, torch.Generator().manual_seed(seed)))


def random_parents(size: int, chance: torch.Generator, chain: float = 0.5) -> tuple[int, ...]:
    """Let half of the nodes continue the previous one, so that there are long paths and one-node levels."""
    parents = [-1]
    for node in range(1, size):
        lone = torch.rand(1, generator=chance).item() < chain
        parents.append(node - 1 if lone else int(torch.randint(node, (1,), generator=chance)))
    return tuple(parents)


def naive_greedy(tokens: list[int], parents: tuple[int, ...], logits: list[list[float]]) -> tuple[tuple[int, ...], int]:
    best = [row.index(max(row)) for row in logits]
    paths = []
    for node in range(len(tokens)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        if all(tokens[child] == best[parents[child]] for child in path[1:]):
            paths.append(tuple(path))
    longest = max(paths, key=len)  # the first of several
    return longest, best[longest[-1]]


def test_greedy_equals_the_naive_walk_on_random_trees():
    chance = torch.Generator().manual_seed(0)
    accepted = []
    for size in [1, 2, 3, 7, 12, 26] * 60:
        parents = random_parents(size, chance)
        tokens = torch.randint(2, (size,), generator=chance)  # two ids: duplicates among siblings, long matches
        logits = torch.randint(3, (size, V), generator=chance).float()  # three values: exact ties
        logits[:, 2:] -= 2
        got = verdict(GreedyVerifier(), tokens, parents, logits)
        assert (got.path, got.bonus) == naive_greedy(tokens.tolist(), parents, logits.tolist())
        accepted.append(got.accepted)
    assert max(accepted) >= 5 and min(accepted) == 0


@pytest.mark.parametrize("seed", range(5))
def test_greedy_on_the_host_decides_as_on_the_device(seed):
    """With few tokens siblings share one, so that several nodes are equally deep."""
    chance = torch.Generator().manual_seed(seed)
    for size in (1, 2, 5, 26, 64):
        for chain in (0.0, 0.5, 0.9):
            parents, tokens = random_parents(size, chance, chain), torch.randint(2, (size,), generator=chance)
            logits_MV = torch.randint(3, (size, 2), generator=chance).float()  # also ties
            context = VerifyContext(DraftTree(tokens, parents), logits_MV, torch.Generator())
            found = GreedyVerifier().follow(parents, tokens.tolist(), logits_MV.argmax(-1).tolist())
            assert list(found) == GreedyVerifier().decide(context).tolist()


def test_greedy_takes_every_leaf_of_the_paper_tree_when_the_target_wants_it():
    shape = TreeShape.parse("paper")
    for leaf in range(1, len(shape)):
        path = [leaf]
        while shape.parents[path[0]] >= 0:
            path.insert(0, shape.parents[path[0]])
        tokens = torch.arange(len(shape))
        logits = torch.zeros(len(shape), 100)
        for parent, child in itertools.pairwise(path):
            logits[parent, tokens[child]] = 1.0
        logits[leaf, 99] = 1.0
        got = verdict(GreedyVerifier(), tokens, shape.parents, logits)
        assert (got.path, got.bonus, got.accepted) == (tuple(path), 99, shape.depths[leaf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_gives_ties_to_the_lowest_id_in_trees_and_alone(dtype):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=dtype)
    got = verdict(GreedyVerifier(), torch.tensor([3]), (-1,), logits)
    assert (got.path, got.bonus) == ((0,), 1)
    assert GreedyVerifier().first(logits[0], torch.Generator()) == 1


def test_greedy_prefers_the_deeper_twin_and_then_the_first():
    logits = torch.zeros(5, V)
    logits[:, 2] = 1.0
    twins = torch.tensor([0, 2, 2, 2, 2])
    assert verdict(GreedyVerifier(), twins, (-1, 0, 0, 1, 2), logits).path == (0, 1, 3)
    assert verdict(GreedyVerifier(), twins, (-1, 0, 0, 2, 0), logits).path == (0, 2, 3)


def test_greedy_never_accepts_an_id_beyond_the_targets_vocabulary():
    assert verdict(GreedyVerifier(), torch.tensor([0, V + 3]), (-1, 0), torch.zeros(2, V)).path == (0,)


def test_sampling_with_one_possible_token_is_greedy():
    chance = torch.Generator().manual_seed(1)
    for size in [1, 3, 9, 26] * 10:
        parents = random_parents(size, chance)
        tokens = torch.randperm(V * 8, generator=chance)[:size]  # no duplicates, where the two rules may differ
        logits = torch.randn(size, V * 8, generator=chance)
        got = verdict(SamplingVerifier(top_k=1), tokens, parents, logits, seed=size)
        assert got == verdict(GreedyVerifier(), tokens, parents, logits)


def test_sampling_repeats_itself_with_the_seed():
    logits = torch.randn(26, V, generator=torch.Generator().manual_seed(2))
    tokens, parents = torch.arange(26) % V, TreeShape.parse("paper").parents
    verdicts = [verdict(SamplingVerifier(), tokens, parents, logits, seed) for seed in range(20)]
    assert verdicts == [verdict(SamplingVerifier(), tokens, parents, logits, seed) for seed in range(20)]
    assert len(set(verdicts)) > 3


def test_sampling_leaves_the_drafters_tensors_alone():
    q = torch.full((3, V), 1 / V, dtype=torch.float64)
    tokens, logits = torch.tensor([0, 1, 2]), torch.randn(3, V, dtype=torch.float64)
    before = q.clone(), tokens.clone(), logits.clone()
    SamplingVerifier().verify(VerifyContext(DraftTree(tokens, (-1, 0, 0), q), logits, torch.Generator()))
    assert all(map(torch.equal, before, (q, tokens, logits)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": 0.0}, "verifier=greedy"),
        ({"temperature": -1.0}, "above 0, got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"top_k": -1}, "got -1"),
        ({"top_p": 0.0}, "got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_sampling_refuses_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingVerifier(**fields)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_sampling_refuses_logits_without_a_distribution(poison):
    logits = torch.zeros(1, V)
    logits[0, 1] = poison
    with pytest.raises(ValueError, match="NaN or"):
        verdict(SamplingVerifier(), torch.tensor([0]), (-1,), logits)
    with pytest.raises(ValueError, match="NaN or"):
        SamplingVerifier().first(logits[0], torch.Generator())


def test_sampling_refuses_q_of_another_length():
    tree = DraftTree(torch.tensor([0, 1]), (-1, 0), torch.full((1, V), 1 / V))
    with pytest.raises(ValueError, match="each of the 2 nodes, got 1"):
        SamplingVerifier().verify(VerifyContext(tree, torch.zeros(2, V), torch.Generator()))
