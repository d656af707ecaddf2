"""A draft in a process of its own, which guesses on while the target checks: the same rounds, and one line if it dies."""

from __future__ import annotations

import os
from functools import partial
from signal import SIGKILL

import pytest
import tiny
import torch

from specvlm.decoding import remote
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.remote import RemoteDrafter, RemoteSession, draft_process
from specvlm.engine import Engine
from specvlm.errors import UserError
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions

FAMILY = "qwen2_5_vl"
pytestmark = pytest.mark.slow  # it starts processes


def meta(model):
    """A model without weights, as a process has that does not run it."""
    return tiny.wrap(tiny.copy.deepcopy(model.hf).to("meta"))


def models(kill_in: int | None = None):
    """Models of the draft's process. kill_in: It is killed in so many passes."""
    draft, count = tiny.draft_of(FAMILY, dtype=torch.float32), 0
    real = draft.append_hidden

    def append_hidden(*given):
        nonlocal count
        count += 1
        if count == kill_in:
            os.kill(os.getpid(), SIGKILL)
        return real(*given)

    if kill_in is not None:
        draft.append_hidden = append_hidden
    return meta(tiny.model(FAMILY)), draft


def graph_of(drafter, verifier, apart: bool) -> DecodingGraph:
    target, draft = tiny.model(FAMILY, dtype=torch.float32), tiny.draft_of(FAMILY, dtype=torch.float32)
    options = GenerationOptions(ratio=0.5, seed=3)
    return DecodingGraph(target, meta(draft) if apart else draft, UniformPruner(), drafter, verifier, options, engine=Engine())


def rounds_of(steps):
    return [(step.tokens, step.tree and (step.tree.tokens.tolist(), step.tree.parents), step.verdict) for step in steps]


@pytest.mark.parametrize("verifier", [GreedyVerifier(), SamplingVerifier(0.8), CoupledVerifier(0.8)], ids=lambda one: one.name)
@pytest.mark.parametrize("drafter", [OverlapDrafter("chain:4"), OverlapDrafter("2x2"), DynamicTreeDrafter(8, 3, 3)], ids=str)
def test_rounds_are_those_of_one_process(drafter, verifier):
    alone = TreeDrafter(drafter.shape) if isinstance(drafter, OverlapDrafter) else drafter
    prompts = [tiny.prompt(FAMILY, seed=number) for number in range(2)]
    want = [rounds_of(list(graph_of(alone, verifier, False).decode(prompt, 24))) for prompt in prompts]
    with draft_process(models, how="fork") as link:
        graph = graph_of(RemoteDrafter(drafter, link), verifier, True)
        found = [list(graph.decode(prompt, 24)) for prompt in prompts]
    assert [rounds_of(steps) for steps in found] == want
    if isinstance(drafter, OverlapDrafter):  # it guesses on by itself, as far as time allows
        assert all(step.ahead is not None for steps in found for step in steps[2:])


def test_a_draft_that_is_killed_ends_the_request_with_one_line():
    with draft_process(partial(models, kill_in=6), how="fork") as link:
        graph = graph_of(RemoteDrafter(OverlapDrafter("chain:2"), link), GreedyVerifier(), True)
        with pytest.raises(UserError, match=r"^the draft's process died without a message; the run cannot go on$"):
            list(graph.decode(tiny.prompt(FAMILY), 24))
    assert not graph.caches._leased


def test_a_draft_that_fails_says_why_and_serves_the_next_request():
    with draft_process(models, how="fork") as link:
        bad = graph_of(RemoteDrafter(OverlapDrafter("90x2"), link), GreedyVerifier(), True)  # 97 tokens, 92 asked
        good = graph_of(RemoteDrafter(OverlapDrafter("chain:2"), link), GreedyVerifier(), True)
        object.__setattr__(bad, "vocabulary", 50)
        with pytest.raises(RuntimeError, match="the draft's process failed: UserError: drafter.shape=90x2 with"):
            list(bad.decode(tiny.prompt(FAMILY), 8))
        prompt = tiny.prompt(FAMILY)
        assert tokens_of(list(good.decode(prompt, 8))) == tiny.hf_greedy(good.target, prompt, 8)


def test_an_answer_that_nobody_waited_for_is_not_taken_for_another():
    with draft_process(models, how="fork") as link:
        graph = graph_of(RemoteDrafter(OverlapDrafter("chain:2"), link), GreedyVerifier(), True)
        steps = graph.decode(tiny.prompt(FAMILY), 24)
        next(steps), next(steps)
        number = next(RemoteSession.numbers)
        remote.tell(link, remote.Asked(number, number, None))  # and interrupted
        steps.close()
        prompt = tiny.prompt(FAMILY, seed=1)
        assert tokens_of(list(graph.decode(prompt, 12))) == tiny.hf_greedy(graph.target, prompt, 12)


def test_requests_take_turns():
    with draft_process(models, how="fork") as link:
        graph = graph_of(RemoteDrafter(OverlapDrafter("chain:2"), link), GreedyVerifier(), True)
        first, second = (graph.decode(tiny.prompt(FAMILY, seed=number), 12) for number in range(2))
        for steps in (first, second):
            next(steps), next(steps)
        with pytest.raises(RuntimeError, match="another request has begun, and only one can run at a time"):
            list(first)
        assert len(list(second)) > 1


def test_drafters_that_read_the_target_are_refused():
    with pytest.raises(UserError, match="drafter=prompt_lookup cannot draft in a separate process"):
        RemoteDrafter(PromptLookupDrafter(), None)
