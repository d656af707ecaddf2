"""Answers of the embedded pairs in bfloat16, with drafters and without, are equal on a GPU."""

from __future__ import annotations

import pytest

from specvlm.decoding import lossless
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import engine_for
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("verifier", [GreedyVerifier(), CoupledVerifier(0.8, top_p=0.95)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("drafter", [TreeDrafter(), TreeDrafter("chain:5"), DynamicTreeDrafter(nodes=12)], ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_answers_of_the_embedded_pairs_in_bfloat16(family, drafter, verifier):
    from specvlm.config import model_folder
    from specvlm.models.load import load
    from specvlm.strategies.datasets.synthetic import SyntheticDataset
    from specvlm.video.video import probe, read_video

    target, draft = (load(model_folder(f"embedded:{family}/{which}"), "bfloat16", "cuda") for which in ("target", "plain"))
    graph = DecodingGraph(
        target,
        draft,
        TwoStagePruner(),
        drafter,
        verifier,
        GenerationOptions(ratio=0.9),
        engine=engine_for("graphs", "cuda"),
    )
    assert graph.engine.exact(target)
    for sample in SyntheticDataset(scenes=6).samples():
        clip = sample.video()
        request = target.prompt(sample.question, [read_video(clip, **target.sampling(probe(clip)))])
        steps = list(graph.decode(request, 64))
        plain = tokens_of(list(autoregressive(target, request, 64, verifier, graph.caches, graph.engine)))
        assert tokens_of(steps) == plain


def test_another_token_is_a_mismatch_where_bits_are_equal():
    from specvlm.config import model_folder
    from specvlm.models.load import load
    from specvlm.video.clips import find_clip
    from specvlm.video.video import probe, read_video

    target = load(model_folder("embedded:qwen2_5_vl/target"), "bfloat16", "cuda")
    clip, engine = find_clip("synthetic_1"), engine_for("graphs", "cuda")
    request = target.prompt("describe the video.", [read_video(clip, **target.sampling(probe(clip)))])
    plain = tokens_of(list(autoregressive(target, request, 8, GreedyVerifier(), engine=engine)))
    other = [*plain[:-1], plain[-1] + 1]
    found = lossless.compare(target, request, plain, other, engine=engine)
    assert found.verdict == "mismatch" and "exact by construction" in found.reason
