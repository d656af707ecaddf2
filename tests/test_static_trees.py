"""Static trees: every guess has the rank that a pristine Hugging Face model gives it after the whole path."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from transformers import DynamicCache

from specvlm.decoding.loop import DecodingGraph
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import TreeShape


@torch.inference_mode()
def behind(hf, prompt):
    """Return a function that ranks next tokens after a prompt and some words, by causal passes without a tree.

    The prompt is prefilled once; the cache is cropped back to it each time.
    """
    past = DynamicCache(config=hf.config.get_text_config())
    hf(**reference.inputs_of(hf, prompt), past_key_values=past, use_cache=True)

    @torch.inference_mode()
    def ranked(words):
        if words_before := past.get_seq_length() - len(prompt):
            past.crop(-words_before)
        out = hf(input_ids=torch.tensor([words]), past_key_values=past, use_cache=True)
        return out.logits[0, -1].argsort(descending=True).tolist()

    return ranked


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", [TreeDrafter, SelfDrafter])
@pytest.mark.parametrize("shape", ["paper", "3x1x2", "chain:4", "[[0],[2],[2,1]]"])
def test_every_guess_is_the_models_own_of_that_rank(family, kind, shape):
    target, draft = tiny.model(family), tiny.draft_of(family)
    prompt, places = tiny.prompt(family), TreeShape.parse(shape)
    ranked = behind(reference.pristine(draft.hf if kind is TreeDrafter else target.hf), prompt)
    graph = DecodingGraph(target, draft, NonePruner(), kind(shape), GreedyVerifier())
    answer: list[int] = []
    steps = list(graph.decode(prompt, 12))
    for step in steps:
        if step.tree is not None:
            tokens, ways = step.tree.tokens.tolist(), {0: []}
            assert step.tree.parents == places.parents and tokens[0] == answer[-1]
            known = {}
            for node, parent in enumerate(places.parents[1:], start=1):
                if parent not in known:
                    known[parent] = ranked(answer + ways[parent])
                assert tokens[node] == known[parent][places.ranks[node]]
                ways[node] = [*ways[parent], tokens[node]]
        answer += step.tokens
    assert len(steps) > 2
