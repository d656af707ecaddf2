"""Every built-in drafter keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from specvlm.strategies import DraftContext, Drafter, DraftSession, drafters
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter, TreeSession
from specvlm.testing import check_drafter
from specvlm.types import DraftTree, Verdict

INSTANCES = [
    TreeDrafter(),
    TreeDrafter("3x1", "sample"),
    OverlapDrafter("2x1", ahead=2),
    DynamicTreeDrafter(nodes=9, depth=3, width=3),
    EntropyTreeDrafter(15, 5, 1, 2, 4),
    SelfDrafter("chain:2"),
    SparseDrafter(24, 4),
    PromptLookupDrafter(),
]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", INSTANCES, ids=repr)
def test_built_in_keeps_the_contract(drafter):
    if getattr(drafter, "children", "auto") == "sample":
        drafter = dataclasses.replace(drafter, children="auto")  # sampling always is refused under greedy
    check_drafter(drafter)


def test_every_built_in_is_checked():
    assert {type(drafter) for drafter in INSTANCES} == set(drafters.specvlm_strategies())


@dataclass(frozen=True)
class Faulty(Drafter):
    """A chain of two guesses without a model, with one fault at a time."""

    name = "faulty"
    model = None
    fault: str = ""

    @property
    def max_nodes(self) -> int:
        return 3

    def start(self, ctx: DraftContext) -> DraftSession:
        return FaultySession(self.fault, ctx)


GLOBAL: list[int] = []


class FaultySession(DraftSession):
    def __init__(self, fault: str, ctx: DraftContext) -> None:
        self.fault, self.ctx, self.round, self.last = fault, ctx, 0, None

    def propose(self, last: Verdict | None) -> DraftTree:
        self.round += 1
        root = self.ctx.bonus if last is None else last.bonus
        tokens, parents, q = [root, 5, 6], (-1, 0, 1), None
        if self.fault == "stale root" and last is not None:
            tokens[0] = self.ctx.bonus + 1
        if self.fault == "parent below its child":
            parents = (-1, 2, 0)
        if self.fault == "parents as a tensor":
            parents = torch.tensor(parents)
        if self.fault == "too many":
            tokens, parents = [*tokens, 7], (*parents, 2)
        if self.fault == "unknown token":
            tokens[2] = 10_000
        if self.fault == "breaks on a whole path" and last is not None and len(last.path) == 3:
            raise IndexError("out of rows")
        if self.fault == "its own chance":
            tokens[1] = int(torch.randint(5, 80, ()))
        if self.fault == "state between requests":
            GLOBAL.append(root)
            tokens[1] = len(GLOBAL) % 80
        sampled = self.ctx.sampling.temperature > 0
        if self.fault == "q of twins" and sampled:
            tokens, parents, q = [root, 5, 5], (-1, 0, 0), torch.full((3, self.ctx.vocabulary), 1 / self.ctx.vocabulary)
        if self.fault == "q that cannot have drawn" and sampled:
            q = torch.zeros(3, self.ctx.vocabulary)
            q[:, 1:3] = 0.5
        if self.fault == "q without a sum" and sampled:
            q = torch.ones(3, self.ctx.vocabulary)
        return DraftTree(torch.tensor(tokens), parents, q)


@pytest.mark.slow
def test_without_a_fault_it_passes():
    check_drafter(Faulty())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale root", "the root is"),
        ("parent below its child", r"parents\[i\] < i"),
        ("parents as a tensor", "tuple of integers"),
        ("too many", "4 nodes exceed max_nodes=3"),
        ("unknown token", "ids known to both"),
        ("breaks on a whole path", "verdicts of every path: IndexError"),
        ("its own chance", "for the same seed|global generator"),
        ("state between requests", "for the same seed"),
        ("q of twins", "repeat a token"),
        ("q that cannot have drawn", "cannot have been drawn"),
        ("q without a sum", "not a distribution"),
    ],
)
def test_a_planted_fault_is_caught(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_drafter(Faulty(fault))


def test_a_drafter_that_writes_into_the_targets_cache_is_caught():
    """The only way for guesses to change the output."""

    @dataclass(frozen=True)
    class Scribbler(Faulty):
        name = "scribbler"

        def start(self, ctx):
            session = super().start(ctx)
            ctx.cache.keys[..., 3:9, :] = 0.0
            return session

    with pytest.raises(AssertionError, match="differs from the target's own at token"):
        check_drafter(Scribbler)


def test_a_drafter_that_trusts_its_draft_to_know_all_tokens_is_caught():
    class Trusting(TreeSession):
        def propose(self, last):
            if last is not None and not 0 <= last.bonus < self.model.vocabulary:
                raise IndexError(f"no embedding {last.bonus}")
            return super().propose(last)

    @dataclass(frozen=True)
    class TrustingDrafter(Drafter):
        name = "trusting"

        @property
        def max_nodes(self):
            return 3

        def start(self, ctx):
            from specvlm.types import TreeShape

            return Trusting(ctx, ctx.draft, TreeShape.parse("chain:2"), None)

    with pytest.raises(AssertionError, match="no embedding"):
        check_drafter(TrustingDrafter)


def test_a_class_that_cannot_be_configured_is_caught():
    class Plain(PromptLookupDrafter):
        name = "plain"

    with pytest.raises(AssertionError, match="frozen=True"):
        check_drafter(Plain)

    @dataclass(frozen=True)
    class Elsewhere(Faulty):
        name = "elsewhere"
        model = "cloud"

    with pytest.raises(AssertionError, match="must be draft, target or None"):
        check_drafter(Elsewhere)
