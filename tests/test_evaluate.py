"""The evaluation drafts against known answers; it must accept what a real decode accepts."""

from __future__ import annotations

import pytest
import tiny
import torch

from experiments.embedded_pair.evaluate import interval, replay
from specvlm.decoding.loop import DecodingGraph, generator_for
from specvlm.results.metrics import tokens_of
from specvlm.strategies import DraftContext, Sampling
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", ["paper", "chain:5"])
@torch.inference_mode()
def test_replay_accepts_what_a_decode_accepts(family, shape):
    target, draft, request, drafter = tiny.model(family), tiny.draft_of(family), tiny.prompt(family), TreeDrafter(shape)
    graph = DecodingGraph(target, draft, UniformPruner(), drafter, GreedyVerifier(), GenerationOptions(ratio=0.5))
    steps = list(graph.decode(request, 40))
    answer = tokens_of(steps)
    keep = graph.select(request, None, target.features(request), generator_for(0))
    context = DraftContext(request, keep, answer[0], target, draft, None, "original", 40, 97, Sampling(), generator_for(0))
    found = replay(drafter.start(context), answer)
    assert [accepted for accepted, full in found if full] == [step.accepted for step in steps[1:] if step.full]
    assert len(found) == len(steps) - 1


def test_interval_holds_the_mean_and_narrows_with_more_scenes():
    few, many = interval([1.0, 2.0, 3.0]), interval([1.0, 2.0, 3.0] * 40)
    assert few[0] == many[0] == 2.0 and few[1] < many[1] < 2.0 < many[2] < few[2]
