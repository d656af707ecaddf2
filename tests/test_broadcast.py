"""Ranks without a draft get rank 0's trees, whatever drafter made them."""

from __future__ import annotations

import copy
from collections import deque
from types import SimpleNamespace

import pytest
import tiny
import torch

from specvlm.decoding.broadcast import BroadcastSession
from specvlm.decoding.loop import DecodingGraph
from specvlm.engine import Engine
from specvlm.parallel.ranks import ProcessGroup
from specvlm.strategies import DraftSession
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.fence import checked_tree
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, TreeShape

CPU, SHAPE = torch.device("cpu"), TreeShape.parse("2x2")


class First(ProcessGroup):
    rank, size = 0, 2

    def __init__(self, wire):
        self.wire = wire

    def share(self, make):
        self.wire.append(copy.deepcopy(made := make()))
        return made

    def first(self, tensor):
        self.wire.append(tensor.clone())
        return tensor


class Second(First):
    rank = 1

    def share(self, make):
        return self.wire.popleft()

    def first(self, tensor):
        told = self.wire.popleft()
        assert (told.shape, told.dtype) == (tensor.shape, tensor.dtype)
        return tensor.copy_(told)


class Given(DraftSession):
    """Drafter that takes its trees from a list."""

    def __init__(self, trees):
        self.trees = deque(trees)

    def propose(self, last):
        return self.trees.popleft()


def fixed(seed, drawn):
    chance = torch.Generator().manual_seed(seed)
    q = torch.rand(len(SHAPE), 9, generator=chance).half() if drawn else None
    return DraftTree(torch.randint(9, (len(SHAPE),), generator=chance), SHAPE.parents, q, ranks=SHAPE.ranks)


def varied(seed, drawn):
    parents = tuple(range(-1, seed))
    return DraftTree(torch.arange(seed + 1), parents, torch.rand(seed + 1, 9) if drawn else None, varies=True)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("make", [fixed, varied])
def test_every_rank_has_the_first_ones_tree(make, drawn):
    trees, wire = [make(seed, drawn) for seed in (1, 2, 3)], deque()
    drafter = SimpleNamespace(fixed=SHAPE if make is fixed else None)
    sessions, generators = [], []
    for ranks, inner in ((First(wire), Given(trees)), (Second(wire), None)):
        generators.append(torch.Generator().manual_seed(7))
        if inner is not None:
            torch.rand(5, generator=generators[-1])  # a session may draw where others have none
        target = SimpleNamespace(ranks=ranks, device=CPU, dtype=torch.float16)
        context = SimpleNamespace(target=target, generator=generators[-1], vocabulary=9)
        sessions.append(BroadcastSession(drafter, inner, context))
    assert torch.equal(*(generator.get_state() for generator in generators))
    for want in trees:
        for session in sessions:
            tree = Engine().finish(session.propose(None))
            assert tree.tokens.tolist() == want.tokens.tolist() and tree.parents == want.parents and tree.ranks == want.ranks
            assert (tree.q is None) == (want.q is None)
            assert tree.q is None or torch.equal(tree.q.float(), want.q.float())
    assert not wire


def test_a_tree_of_another_shape_than_the_fixed_one_is_refused():
    target = SimpleNamespace(ranks=First(deque()), device=CPU, dtype=torch.float32)
    context = SimpleNamespace(target=target, generator=torch.Generator(), vocabulary=9)
    session = BroadcastSession(SimpleNamespace(fixed=SHAPE), Given([varied(2, False)]), context)
    with pytest.raises(ValueError, match="does not have the drafter.s `fixed` shape"):
        Engine().finish(session.propose(None))


@pytest.mark.parametrize("foreign", [False, True])
def test_trees_of_others_are_checked_as_theirs_although_our_session_hands_them_on(foreign, monkeypatch):
    class Others(PromptLookupDrafter):
        pass

    drafter, heard = Others() if foreign else PromptLookupDrafter(), []

    def checked(*given):
        heard.append(given[-1])
        return checked_tree(*given)

    monkeypatch.setattr("specvlm.decoding.loop.checked_tree", checked)
    monkeypatch.setattr(DecodingGraph, "_session", lambda self, ctx: BroadcastSession(drafter, drafter.start(ctx), ctx))
    graph = DecodingGraph(tiny.model("qwen2_5_vl"), None, UniformPruner(), drafter, GreedyVerifier())
    assert list(graph.decode(tiny.prompt("qwen2_5_vl"), 4)) and set(heard) == {not foreign}
