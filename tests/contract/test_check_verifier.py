"""Every built-in verifier keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from specvlm.strategies import Sampling, Verifier, VerifyContext, verifiers
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.testing import check_verifier
from specvlm.testing import verifier as contract
from specvlm.types import DraftTree, Verdict

INSTANCES = [
    GreedyVerifier(),
    SamplingVerifier(),
    SamplingVerifier(0.7, top_p=0.9),
    CoupledVerifier(0.7, top_p=0.9),
    LooseVerifier(),
    LooseVerifier(1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("verifier", INSTANCES, ids=repr)
def test_built_in_keeps_the_contract(verifier):
    check_verifier(verifier)


def test_every_built_in_is_checked():
    assert {type(verifier) for verifier in INSTANCES} == set(verifiers.specvlm_strategies())


MEMORY: list[int] = []


@dataclass(frozen=True)
class Faulty(GreedyVerifier):
    name = "faulty"
    fault: str = ""

    @property
    def sampling(self):
        return "greedy" if self.fault == "sampling of another type" else Sampling()

    def dice(self, nodes):
        return 3 if self.fault == "numbers not announced" else 0

    def decide(self, ctx: VerifyContext):
        fault = self.fault
        if fault == "second best":
            best = ctx.logits_MV.topk(2).indices[:, 1]
            return torch.stack([torch.zeros_like(best[0]), best[0]])
        if fault == "accepts nothing":
            return torch.stack([torch.zeros((), dtype=torch.int64), ctx.logits_MV[0].argmax()])
        if fault == "accepts anything":
            last = len(ctx.tree) - 1
            return torch.tensor([last, int(ctx.logits_MV[last].argmax())])
        if fault == "reads":
            assert ctx.logits_MV.max() > -1
            if bool(ctx.logits_MV.sum() > 0):
                return super().decide(ctx)
        if fault == "changes its input":
            ctx.logits_MV.mul_(2)
        if fault == "token that is none":
            return torch.tensor([0, 999])
        if fault == "three integers":
            return torch.cat([super().decide(ctx), torch.zeros(1, dtype=torch.int64)])
        if fault == "numbers not announced":
            ctx.numbers(5)
        if fault == "global chance":
            torch.rand(())
        return super().decide(ctx)


@dataclass(frozen=True)
class FaultyHost(GreedyVerifier):
    name = "faulty_host"
    fault: str = ""

    def verify(self, ctx):
        verdict = super().verify(ctx)
        if self.fault == "remembers":
            MEMORY.append(1)
            return Verdict(verdict.path[: 1 + len(MEMORY) % 2], verdict.bonus)
        if self.fault == "skips nodes":
            return Verdict((0, len(ctx.tree) - 1), verdict.bonus)
        if self.fault == "no verdict":
            return verdict.path
        return verdict

    def first(self, logits_V, generator):
        return 5 if self.fault == "first goes its own way" else super().first(logits_V, generator)


def test_without_a_fault_they_pass():
    check_verifier(Faulty())
    check_verifier(FaultyHost())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("second best", "is not lossless: the bonus"),
        ("accepts nothing", "accepted in full"),
        ("accepts anything", "is not lossless: it accepts|value of a tensor"),
        ("reads", "value of a tensor"),
        ("changes its input", "changed its input logits"),
        ("token that is none", "must be a token"),
        ("three integers", "failed on|two integers"),
        ("numbers not announced", "asks for 5 random numbers"),
        ("global chance", "global generator"),
        ("sampling of another type", "must be a Sampling"),
    ],
)
def test_a_planted_fault_is_caught(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_verifier(Faulty(fault))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("remembers", "for the same context and seed|is not lossless"),
        ("skips nodes", "must lead from the root"),
        ("no verdict", "not a Verdict"),
        ("first goes its own way", "`first` gives 5"),
    ],
)
def test_a_planted_fault_of_a_rule_on_the_host_is_caught(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_verifier(FaultyHost(fault))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["another q", "another temperature", "greedy bonus"])
def test_a_rule_that_samples_from_something_else_is_caught(fault):
    @dataclass(frozen=True)
    class Wrong(SamplingVerifier):
        name = "wrong"

        def decide(self, ctx):
            if fault == "greedy bonus":
                ctx.numbers(2 * len(ctx.tree))
                return torch.stack([torch.zeros((), dtype=torch.int64), ctx.logits_MV[0].argmax()])
            if fault == "another q":
                q = None if ctx.tree.q is None else torch.full_like(ctx.tree.q, 1 / ctx.tree.q.shape[1])
                tree = DraftTree(ctx.tree.tokens, ctx.tree.parents, q)
                return super().decide(VerifyContext(tree, ctx.logits_MV, ctx.generator, ctx.dice))
            flat = VerifyContext(ctx.tree, ctx.logits_MV * 0.5, ctx.generator, ctx.dice)  # another temperature than it says
            return super().decide(flat)

    with pytest.raises(AssertionError, match="distribution|accepted in full"):
        check_verifier(Wrong)


def test_a_rule_that_says_it_is_lossy_is_not_held_to_the_targets_argmax():
    @dataclass(frozen=True)
    class Lossy(Faulty):
        name = "lossy"
        lossless = False

    check_verifier(Lossy("second best"))
    assert issubclass(Lossy, Verifier) and contract.RUNS > 1000
