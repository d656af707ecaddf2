"""The embedded pairs in float32: every strategy gives the output of Hugging Face's `generate`."""

from __future__ import annotations

import json
from functools import cache

import packages
import pytest
import reference
import torch
from covering import covering, sampled
from test_lossless import PRUNERS
from towers import remember_features, remember_passes
from transformers import AutoModelForImageTextToText

from experiments.embedded_pair.evaluate import DRAFTS
from specvlm.config import model_folder
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine.lean import ROWS
from specvlm.fit_tree.__main__ import Round, best_tree, fit_ranks
from specvlm.models.load import check_pair, load
from specvlm.models.video_lm import VideoLM
from specvlm.results.metrics import acceptance_of, tokens_of
from specvlm.strategies import Drafter, Pruner, Verifier, registry
from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier
from specvlm.types import GenerationOptions, KeepSet
from specvlm.video.clips import find_clip
from specvlm.video.video import probe, read_video

GREEDY = GreedyVerifier()
FOOTAGE = 64  # tokens of an answer about real footage, which would go on without an end
FEW = 8  # frames, where every strategy meets every other: half of what the models take


@cache
def model(family: str, name: str) -> VideoLM:
    """Load a model of a pair that encodes each video once, and prefills each prompt and pruned view once."""
    return remember_passes(remember_features(load(model_folder(f"embedded:{family}/{name}"), "float32")), least=ROWS + 1)


@cache
def request_of(family: str, clip: str = "synthetic_1", question: str = "how many objects appear?", frames: int = 0):
    """Make a request. frames: 0 for as many as the model would take."""
    lm, path = model(family, "target"), find_clip(clip)
    return lm.prompt(question, [read_video(path, **({"frames": frames} if frames else lm.sampling(probe(path))))])


@cache
def answer_of_generate(family: str, limit: int = 200, **fields) -> tuple[int, ...]:
    """Decode with a model that Hugging Face loads, under its own attention."""
    folder = model_folder(f"embedded:{family}/target")
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return tuple(reference.generated(hf, request_of(family, **fields), limit, pad_token_id=None))


def decode(family, pruner, drafter, ratio, draft="plain", verifier=GREEDY, limit=200, **fields):
    graph = DecodingGraph(
        model(family, "target"), model(family, draft), pruner, drafter, verifier, GenerationOptions(ratio=ratio)
    )
    return list(graph.decode(request_of(family, **fields), limit))


@pytest.mark.slow
@pytest.mark.parametrize(("pruner", "family"), sampled(PRUNERS, list(DRAFTS)), ids=str)
def test_every_pruner_and_drafter_gives_the_output_of_generate(family, pruner):
    """Every drafter with each ratio, in one family or another; `make campaign ARGS=families` has all crossings."""
    expected = answer_of_generate(family, frames=FEW)
    for number, drafter in enumerate((TreeDrafter(), TreeDrafter("chain:5"), SelfDrafter("chain:3"))):
        ratio = (0.5, 0.9)[(number + list(DRAFTS).index(family)) % 2]
        assert tuple(tokens_of(decode(family, pruner, drafter, ratio, frames=FEW))) == expected, f"{drafter}, ratio {ratio}"


@pytest.mark.slow
@pytest.mark.parametrize("family", DRAFTS)
def test_a_drafter_that_asks_no_pruner_gives_the_output_of_generate(family, monkeypatch):
    """Such drafters see all tokens, or none."""
    monkeypatch.setattr(UniformPruner, "select", None)
    expected = answer_of_generate(family, frames=FEW)
    for drafter in (TreeDrafter(), TreeDrafter("chain:5"), SelfDrafter("chain:3"), PromptLookupDrafter()):
        for ratio in (0, 1):
            assert tuple(tokens_of(decode(family, UniformPruner(), drafter, ratio, frames=FEW))) == expected, (
                f"{drafter}, ratio {ratio}"
            )


LONG = {"question": "describe the video.", "frames": FEW}
FIRST = 28  # tokens of a long answer


@cache
def own_answer(family: str) -> list[int]:
    lm = model(family, "target")
    return tokens_of(list(autoregressive(lm, request_of(family, **LONG), FIRST, GREEDY)))


def fitted(family: str) -> TreeDrafter:
    """Fit the best tree of at most 9 guesses for this pair, from rounds of a wide tree."""
    steps = decode(family, TwoStagePruner(), TreeDrafter("4x2x2x1"), 0.9, limit=FIRST, **LONG)
    rounds = [Round(step.ranks, step.widths) for step in steps[1:]]
    return TreeDrafter(json.dumps(best_tree(fit_ranks(rounds), 9)))


DRAFTERS = {
    "tree": [TreeDrafter(), TreeDrafter("4x2"), fitted],
    "overlap": [OverlapDrafter(), OverlapDrafter("2x2x1", corrections=3, ahead=2)],
    "self": [SelfDrafter("chain:2")],
    "dynamic_tree": [DynamicTreeDrafter(), DynamicTreeDrafter(9, 3, 4)],
    "entropy_tree": [EntropyTreeDrafter()],
    "sparse": [SparseDrafter(), SparseDrafter(128, 5)],
    "prompt_lookup": [PromptLookupDrafter()],
}
VERIFIERS = (GREEDY, SamplingVerifier(top_k=1), CoupledVerifier(top_k=1))  # one token to draw from: greedy by other ways
OF_PACKAGES = packages.strategies(Pruner)


def test_no_lossless_strategy_is_left_out_below():
    def names(kind):
        return {name for name, info in registry.collect()[kind].items() if getattr(info.cls, "lossless", True)}

    assert {pruner.name for pruner in PRUNERS} == names("pruner")
    assert DRAFTERS.keys() == names("drafter") and {verifier.name for verifier in VERIFIERS} == names("verifier")
    assert len(OF_PACKAGES) == sum(len(packages.strategies(kind)) for kind in (Pruner, Drafter, Verifier)) >= 18


@pytest.mark.slow
@pytest.mark.parametrize(("pruner", "family"), sampled(OF_PACKAGES, list(DRAFTS)), ids=lambda of: getattr(of, "name", of))
def test_every_package_gives_the_targets_own_output(family, pruner):
    """With one of two drafters and ratios, in the next family with the other one."""
    turn = (list(DRAFTS).index(family) + OF_PACKAGES.index(pruner)) % 2
    drafter, ratio = ((TreeDrafter(), 0.9), (TreeDrafter("chain:3"), 0.5))[turn]
    steps = decode(family, pruner, drafter, ratio, limit=FIRST, **LONG)
    assert tokens_of(steps) == own_answer(family), f"{drafter}, ratio {ratio}"
    keep = steps[1].keep
    assert 0 < len(keep) <= KeepSet.budget(keep.total, ratio) and not keep.note
    assert sum(step.accepted for step in steps) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "verifier"), covering(list(DRAFTERS), list(DRAFTS), VERIFIERS), ids=lambda of: getattr(of, "name", of)
)
def test_every_drafter_and_lossless_verifier_gives_the_targets_own_output(family, verifier, name):
    for drafter in DRAFTERS[name]:
        drafter = drafter(family) if drafter is fitted else drafter
        steps = decode(family, TwoStagePruner(), drafter, 0.9, verifier=verifier, limit=FIRST, **LONG)
        assert tokens_of(steps) == own_answer(family), repr(drafter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "clip"),
    sampled([(family, draft) for family in DRAFTS for draft in DRAFTS[family]], ["synthetic_2", "bbb_apple"]),
    ids=str,
)
def test_long_answers_and_real_footage_are_lossless_too(pair, clip):
    family, draft = pair
    fields = {"clip": clip, "question": "describe the video.", "limit": FOOTAGE if clip == "bbb_apple" else 200}
    steps = decode(family, TwoStagePruner(), TreeDrafter(), 0.9, draft, **fields)
    assert tuple(tokens_of(steps)) == answer_of_generate(family, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "drafter", "clip"),
    sampled(list(DRAFTS), [DynamicTreeDrafter(), SparseDrafter(256), EntropyTreeDrafter()], ["synthetic_1", "bbb_apple"]),
    ids=str,
)
def test_drafters_that_decide_for_themselves_are_lossless_too(family, drafter, clip):
    steps = decode(family, TwoStagePruner(), drafter, 0.9, clip=clip, frames=FEW, limit=FOOTAGE)
    assert tuple(tokens_of(steps)) == answer_of_generate(family, clip=clip, frames=FEW, limit=FOOTAGE)


@pytest.mark.slow
@pytest.mark.parametrize("ratios", [(0.9,), pytest.param((0.5, 0.9), marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("family", DRAFTS)
def test_a_dynamic_tree_accepts_no_less_than_the_static_one_of_as_many_nodes(family, ratios):
    """On average over these scenes, with the same pruned view."""
    accepted = {"static": [], "dynamic": []}
    for clip in ("synthetic_1", "synthetic_2", "synthetic_3"):
        for ratio in ratios:
            for name, drafter in (("static", TreeDrafter()), ("dynamic", DynamicTreeDrafter())):
                fields = {"clip": clip, "question": "describe the video."}
                steps = decode(family, TwoStagePruner(), drafter, ratio, limit=64, **fields)
                accepted[name] += [step.accepted for step in steps[1:] if step.full]
                assert all(step.drafted == 25 for step in steps[1:])
    means = {name: sum(found) / len(found) for name, found in accepted.items()}
    assert means["dynamic"] >= means["static"], means


@pytest.mark.slow
def test_sparse_to_dense_with_every_entry_is_accepted_in_full():
    for family in DRAFTS:
        steps = decode(family, NonePruner(), SparseDrafter(100_000), 0.9, clip="synthetic_2", question="describe the video.")
        assert acceptance_of(steps)["acceptance_by_depth"] == [1.0] * 9


@pytest.mark.slow
@pytest.mark.parametrize("family", DRAFTS)
def test_the_target_as_its_own_drafter_is_accepted_in_full(family):
    steps = decode(family, NonePruner(), SelfDrafter(), 0.9, clip="synthetic_2", question="describe the video.")
    assert acceptance_of(steps)["acceptance_by_depth"] == [1.0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("family", DRAFTS)
def test_generation_ends_at_each_of_the_checkpoints_stop_ids(family):
    lm = model(family, "target")
    assert len(lm.stop_ids) >= 2 and check_pair(lm, model(family, "plain")) == lm.vocabulary
    answer = tokens_of(list(autoregressive(lm, request_of(family), 200, GREEDY)))
    assert answer[-1] in lm.stop_ids and not lm.stop_ids & set(answer[:-1])
