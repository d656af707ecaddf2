"""What a request may ask of the loop beside its limits: a rule on the logits, log-probabilities, a shared prefill."""

from __future__ import annotations

import pytest
import tiny
import torch

from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.engine.adjusted import penalty_for
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import DraftTree, GenerationOptions

ENGINES = {"eager": Engine, "direct": lambda: GraphsEngine("direct")}


def against_repeats(answer, logits_V):
    """Forbid what came in the last four tokens, and favour the sum of the last two: order and place count."""
    changed = logits_V.clone()
    if answer:
        changed[list(answer[-4:])] -= 3.0
        changed[sum(answer[-2:]) % len(logits_V)] += 1.0 + len(answer) % 3
    return changed


def graph_of(family, drafter=None, verifier=None, engine=None, **options) -> DecodingGraph:
    made = GenerationOptions(**{"max_new_tokens": 14, "ratio": 0.5} | options)
    models = tiny.model(family), tiny.draft_of(family)
    strategies = UniformPruner(), drafter or TreeDrafter(), verifier or GreedyVerifier()
    return DecodingGraph(*models, *strategies, made, engine=engine or Engine())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_node_of_a_tree_is_judged_by_the_answer_up_to_it(family):
    target, prompt = tiny.model(family), tiny.prompt(family)
    rule = penalty_for(target, prompt, GenerationOptions(adjust=against_repeats, repetition_penalty=1.3))
    plain = penalty_for(target, prompt, GenerationOptions(repetition_penalty=1.3))
    for penalty in (rule, plain):
        penalty.add(torch.tensor([5, 9]))
    tree = DraftTree(torch.tensor([9, 3, 4, 7, 9]), (-1, 0, 0, 1, 3))
    logits_MV = torch.randn(5, target.vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ways = ((), (3,), (4,), (3, 7), (3, 7, 9))
    want = [against_repeats([5, 9, *way], row_V) for way, row_V in zip(ways, plain(logits_MV, tree), strict=True)]
    assert torch.equal(rule(logits_MV, tree), torch.stack(want))
    assert torch.equal(rule(logits_MV[:1])[0], against_repeats([5, 9], plain(logits_MV[:1])[0]))


@pytest.mark.parametrize("verifier", [GreedyVerifier(), CoupledVerifier(0.8)], ids=lambda v: v.name)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_rule_gives_the_targets_own_output_with_every_drafter_and_engine(family, engine, verifier):
    target, prompt, made = tiny.model(family), tiny.prompt(family), ENGINES[engine]()
    options = GenerationOptions(14, 0.5, adjust=against_repeats)
    want = tokens_of(list(autoregressive(target, prompt, options, verifier)))
    assert want != tokens_of(list(autoregressive(target, prompt, GenerationOptions(14, 0.5), verifier)))
    assert tokens_of(list(autoregressive(target, prompt, options, verifier, engine=made))) == want
    for drafter in (TreeDrafter(), TreeDrafter("chain:3"), PromptLookupDrafter()):
        graph = graph_of(family, drafter, verifier, made, adjust=against_repeats)
        assert tokens_of(list(graph.decode(prompt))) == want


@pytest.mark.parametrize("limit", [1, 9])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_are_those_of_the_plain_logits_and_change_no_token(family, engine, limit):
    target, prompt = tiny.model(family), tiny.prompt(family)
    asked = {"max_new_tokens": limit, "adjust": against_repeats}
    steps = list(graph_of(family, engine=ENGINES[engine](), logprobs=2, **asked).decode(prompt))
    tokens = tokens_of(steps)
    assert tokens == tokens_of(list(graph_of(family, **asked).decode(prompt)))
    assert all(step.logprobs is None for step in steps[:-1]) and [one.token for one in steps[-1].logprobs] == tokens
    longer = type(prompt)(
        torch.cat([prompt.tokens, torch.tensor(tokens[:-1], dtype=torch.int64)]),
        prompt.video_index,
        prompt.grids,
        prompt.videos,
    )
    with torch.inference_mode():
        logits_TV = target.hf(**target.generate_inputs(longer)).logits[0, len(prompt) - 1 :].log_softmax(-1)
    for one, row_V in zip(steps[-1].logprobs, logits_TV, strict=True):
        values, ids = row_V.topk(2)
        assert one.logprob == pytest.approx(float(row_V[one.token]), abs=1e-5)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)
