"""Pipelined models, with layers split over devices. Both stages are on the CPU; transfers between them are recorded."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import tiny
import torch
from covering import sampled

from experiments.embedded_pair.evaluate import DRAFTS
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.decoding.lossless import compare
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.errors import UserError
from specvlm.models.load import load
from specvlm.models.partition import Stage, device_map, split
from specvlm.results.metrics import tokens_of
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, Step

DRAFTERS = {
    "tree": TreeDrafter(),
    "chain": TreeDrafter(shape="chain:4"),
    "self": SelfDrafter(),
    "prompt_lookup": PromptLookupDrafter(),
}
ENGINES = {"eager": Engine, "direct": lambda: GraphsEngine("direct")}
CPU = torch.device("cpu")


def in_stages(family: str, *ends: int):
    """Copy the tiny model, with its three layers split after the given ones."""
    whole = tiny.model(family)
    starts = [0, *ends]
    stages = [Stage(CPU, a, b) for a, b in zip(starts, [*ends, whole.layers], strict=True)]
    return type(whole)(whole.hf, whole.tokenizer, whole.folder, whole.mrope, stages)


@cache
def of_the_whole(family: str, drafter: str, seed: int) -> list[Step]:
    pair, strategies = (tiny.model(family), tiny.draft_of(family)), (TwoStagePruner(), DRAFTERS[drafter], GreedyVerifier())
    return list(DecodingGraph(*pair, *strategies, GenerationOptions(ratio=0.5)).decode(tiny.prompt(family, seed=seed), 20))


CASES = [*product(DRAFTERS, ("eager", "direct"), [(1,)]), ("tree", "direct", (1, 2)), ("tree", "eager", (1, 2))]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "family"), sampled(CASES, tiny.FAMILIES), ids=str)
def test_a_split_target_gives_the_whole_ones_output(family, case):
    drafter, engine, ends = case
    lm = in_stages(family, *ends)
    made = ENGINES[engine]()
    graph = DecodingGraph(
        lm,
        tiny.draft_of(family),
        TwoStagePruner(),
        DRAFTERS[drafter],
        GreedyVerifier(),
        GenerationOptions(ratio=0.5),
        engine=made,
    )
    for seed in (0, 1):  # the second request runs what the first has captured
        request, want = tiny.prompt(family, seed=seed), of_the_whole(family, drafter, seed)
        steps = list(graph.decode(request, 20))
        assert tokens_of(steps) == tokens_of(want) == tiny.hf_greedy(tiny.model(family), request, 20)
        assert [step.accepted for step in steps] == [step.accepted for step in want]
        alone = tokens_of(list(autoregressive(lm, request, 20, GreedyVerifier(), caches=graph.caches, engine=made)))
        assert alone == tokens_of(want)
        assert compare(lm, request, alone, [*alone[:-1], (alone[-1] + 1) % 90]).verdict == "mismatch"


def test_repetition_penalty_and_sampling(monkeypatch):
    family = "qwen2_5_vl"
    request = tiny.prompt(family)
    outs = []
    for lm, engine in ((tiny.model(family), Engine()), (in_stages(family, 1), GraphsEngine("direct"))):
        monkeypatch.setattr(lm, "repetition_penalty", 1.3)
        for verifier in (GreedyVerifier(), SamplingVerifier(temperature=0.8), CoupledVerifier(0.8)):
            drafter = PromptLookupDrafter()
            graph = DecodingGraph(lm, None, TwoStagePruner(), drafter, verifier, GenerationOptions(ratio=0.5), engine=engine)
            outs.append(tokens_of(list(graph.decode(request, 20))))
    assert outs[:3] == outs[3:]


def test_all_that_crosses_goes_through_one_function(monkeypatch):
    """A pass uses only what `cross` handed over: weights and keys of other stages are made unusable."""
    family = "qwen2_5_vl"
    lm, request, seen = in_stages(family, 2), tiny.prompt(family), []

    def spy(device, *tensors):
        seen.append([None if t is None else tuple(t.shape) for t in tensors])
        return tuple(None if t is None else t.clone() for t in tensors)

    monkeypatch.setattr("specvlm.models.partition.cross", spy)
    cache = lm.new_cache(200)
    with torch.inference_mode():
        lm.prefill(lm.embed(request, lm.features(request)), lm.positions(request), cache, request.cut)
        Engine().append(lm, torch.tensor([5]), cache)
    passes, width = 2 + 1, tiny.TEXT["hidden_size"]
    assert len(seen) == passes * 2
    assert all(shapes[0][-1] == width and shapes[1] is None and len(shapes) == 4 for shapes in seen)
    assert [len(store.keys) for store in cache.stores] == [2, 1]


def test_cache_of_a_split_model_keeps_and_fits_by_stage():
    lm = in_stages("qwen2_5_vl", 1)
    cache, whole = lm.new_cache(16), tiny.model("qwen2_5_vl").new_cache(16)
    assert cache.fits(lm, 16) and not cache.fits(tiny.model("qwen2_5_vl"), 16) and not whole.fits(lm, 16)
    assert cache.nbytes == whole.nbytes
    for layer in range(3):
        rows = torch.randn(1, 2, 9, 8, dtype=torch.float64)
        for one in (cache, whole):
            one.update(rows, -rows, layer)
    for one in (cache, whole):
        one.keep(3, [0, 2, 5])
    for layer in range(3):
        for ours, theirs in zip(cache.layer(layer), whole.layer(layer), strict=True):
            assert torch.equal(ours[..., :6, :], theirs[..., :6, :])


@pytest.mark.parametrize(
    ("layers", "room", "counts"),
    [(80, (1, 1), [40, 40]), (80, (50.0, 65.0), [35, 45]), (3, (100, 1, 1), [1, 1, 1]), (5, (1, 100), [1, 4])],
)
def test_layers_go_where_there_is_room(layers, room, counts):
    assert split(layers, room) == counts


def test_more_devices_than_layers_are_refused():
    with pytest.raises(UserError, match="3 layers cannot be split over 4 devices: use at most 3"):
        split(3, (1, 1, 1, 1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_device_map_names_every_part_once(family):
    hf = tiny.model(family).hf
    placed = device_map(hf, [1, 2], [torch.device("cuda", number) for number in range(2)])
    for name, _ in [*hf.named_parameters(), *hf.named_buffers()]:
        assert sum(name == part or name.startswith(f"{part}.") for part in placed) == 1, name
    assert [placed[f"model.language_model.layers.{n}"].index for n in range(3)] == [0, 1, 1]
    assert (placed["model.language_model.embed_tokens"].index, placed["lm_head"].index) == (0, 1)


@pytest.mark.parametrize("family", DRAFTS)
def test_a_checkpoint_is_read_through_hugging_faces_device_map(family):
    """Both devices are the CPU. The result is the model that `load` gives without a map, without accelerate's hooks."""
    pytest.importorskip("accelerate")
    folder = model_folder(f"embedded:{family}/target")
    plain = load(folder, "float32")
    mapped = load(folder, "float32", split=[(2, CPU), (plain.layers - 2, CPU)])
    assert not [name for name, module in mapped.hf.named_modules() if hasattr(module, "_hf_hook")]
    ours, theirs = dict(mapped.hf.named_parameters()), dict(plain.hf.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
