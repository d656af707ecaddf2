"""On a GPU, a request that finds a beginning of its prompt has the bits of one that does not: rows, tokens, kept tokens."""

from __future__ import annotations

import pytest
import torch

from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.engine import engine_for
from specvlm.models.load import load
from specvlm.strategies.datasets.synthetic import SyntheticDataset
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions
from specvlm.video.video import probe, read_video

pytestmark = pytest.mark.gpu
PRUNERS = {"two_stage": TwoStagePruner(), "uniform": UniformPruner(), "none": NonePruner()}
QUESTIONS = ("describe the video.", "how many objects appear?", "what color is the background?")


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_a_hit_has_the_bits_of_a_miss(family, pruner, host):
    target, draft = (load(model_folder(f"embedded:{family}/{name}"), "bfloat16", "cuda") for name in ("target", "plain"))
    engine, scene = engine_for("graphs", torch.device("cuda")), next(iter(SyntheticDataset(scenes=1).samples())).video()
    clip = read_video(scene, **target.sampling(probe(scene)))
    strategies = (PRUNERS[pruner], TreeDrafter("chain:4"), GreedyVerifier())
    options = GenerationOptions(24, 0.5)
    messages, store = [], PrefixStore(2**30, 2**30)
    for number in range(5):
        question = [{"type": "text", "text": QUESTIONS[number % 3]}]
        # Three questions about the video, then two more turns of the third chat.
        first = [{"role": "user", "content": [{"type": "video", "video": clip}, *question]}]
        messages = first if number < 3 else [*messages, {"role": "user", "content": question}]
        prompt, found = target.chat(messages), []
        for kept in (store, None):
            graph = DecodingGraph(target, draft, *strategies, options, engine=engine)
            graph.prefixes = kept
            steps = list(graph.decode(prompt))
            tokens = [token for step in steps for token in step.tokens]
            keep = next(step.keep.index.tolist() for step in steps if step.keep is not None)
            (cache,) = (one for one in graph.caches.held if one.fits(target, len(prompt) + 24))
            rows = [tensor[:, :, :, : len(prompt) + len(tokens) - 1].clone() for part in cache.stores for tensor in part]
            found.append((tokens, keep, rows, steps[0].reused))
        (tokens, keep, rows, reused), (want, wanted, expected, _) = found
        assert tokens == want and keep == wanted and all(map(torch.equal, rows, expected))
        assert bool(reused.tokens) == bool(number)
        messages = [*messages, {"role": "assistant", "content": target.tokenizer.decode(tokens, skip_special_tokens=True)}]
        if host:  # all moves to host memory and comes back
            store.resize(1)
            store.resize(2**30)
