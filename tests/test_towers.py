"""The tests' caches of model results return what the model would, and nothing else is mistaken for it."""

from __future__ import annotations

import pytest
import tiny
import torch
from towers import remember_features, remember_passes

from specvlm.engine import Engine
from specvlm.engine.base import tree_pass
from specvlm.models.pauses import finished
from specvlm.types import DraftTree, TreeShape


def passes(lm, request, root):
    """Return logits of a tree after a prompt, and the cache after both."""
    parents, cache = TreeShape.parse("3x2").parents, lm.new_cache(len(request) + 16)
    hidden_D = lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut)
    tree = DraftTree(torch.arange(root, root + len(parents)), parents)
    logits_MV = Engine().run([tree_pass(lm, tree, cache)])[0].logits()
    return hidden_D, logits_MV, cache.keys, cache.values, torch.tensor([cache.length, cache.offset])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_a_pass_that_is_remembered_gives_and_writes_what_the_models_own_does(family):
    """Two prompts and two trees alternate: with another cache or other rows, it is another pass."""
    own, ran, counts = tiny.model(family), [], []
    kept = tiny.wrap(own.hf)
    compute = kept._layers
    kept._layers = lambda *pass_: ran.append(1) or compute(*pass_)
    remember_passes(remember_features(kept))
    for _ in "ab":
        for seed, root in ((0, 10), (1, 10), (0, 20)):
            request = tiny.prompt(family, seed)
            for ours, theirs in zip(passes(kept, request, root), passes(own, request, root), strict=True):
                assert torch.equal(ours, theirs)
        counts.append(len(ran))
    assert counts == [3 + 2 * 2] * 2, "one pass of each tree, and two of each prefill"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_a_video_that_is_remembered_has_the_models_own_features_both_ways(family):
    own, ran = tiny.model(family), []
    kept = tiny.wrap(own.hf)
    compute = kept.encode_video
    kept.encode_video = lambda *video: ran.append(1) or compute(*video)
    remember_features(kept)
    for seed in (0, 1, 0):
        request = tiny.prompt(family, seed)
        for _ in "ab":
            assert torch.equal(finished(kept.encoding(request, 0)), own.features(request))
            assert torch.equal(kept.features(request), own.features(request))
    assert len(ran) == 2
