"""What a draft keeps of a video: features frame by frame, and rows, behind which it starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import tiny
import torch

from specvlm.decoding.draft_prefix import ReusedDraftPrefill, frames_alone, frames_of
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.engine import Engine
from specvlm.engine.cuda_graphs import GraphsEngine
from specvlm.models.text_passes import TextPasses
from specvlm.results.metrics import tokens_of
from specvlm.strategies import PruneContext, Pruner
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import GenerationOptions, KeepSet, entering


@dataclass(frozen=True)
class Choosing(Pruner):
    """Keeps the tokens of one of several lists after the other."""

    name = "choosing"
    lists: list = field(default_factory=list, compare=False)

    def select(self, ctx: PruneContext) -> KeepSet:
        return KeepSet(torch.tensor(self.lists.pop(0)), ctx.total)


def asking(prompt, *words):
    return replace(prompt, tokens=torch.cat([prompt.tokens[: prompt.cut], torch.tensor(words)]))


def tokens_in(prompt, *frames):
    """Two tokens of each chosen frame, counted over all videos."""
    found, start, before = [], 0, 0
    for grid in prompt.grids:
        for frame in frames:
            if before <= frame < before + grid.frames:
                found += [start + (frame - before) * grid.per_frame + at for at in (1, 2)]
        start, before = start + len(grid), before + grid.frames
    return sorted(found)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_frames_that_were_not_seen_are_encoded(family, videos, free, monkeypatch):
    lm, prompt, store = tiny.draft_of(family), tiny.prompt(family, videos=videos), PrefixStore(2**30)
    keys = store.keys(lm, prompt, Engine())
    filling = ReusedDraftPrefill(store, keys, Engine(), UniformPruner(), free)
    total, encoded = len(prompt.video_index), []
    encode = type(lm).encode_frames
    monkeypatch.setattr(
        type(lm), "encode_frames", lambda lm, pixels, grid, patches, frames, of: encoded.append(
            grid.frames if frames is None else len(frames)
        ) or encode(lm, pixels, grid, patches, frames, of),
    )  # fmt: skip
    longer = sum(grid.frames for grid in prompt.grids) - 4 * videos  # its last frame goes with the first one
    asked = [(0, 2), (2,), (0, 1, 2), (3,), (0, 1, 2, 3)]
    wanted = [2, 0, 2, 0, 0] if free else [2, 1, 3, 1, 4]  # of three frames in four, all
    wanted = [
        count * videos + longer * (0 in frames and (not free or at == 0))
        for at, (frames, count) in enumerate(zip(asked, wanted, strict=True))
    ]
    for number in range(1, videos):
        asked = [
            (*frames, *(frame + 4 * number for frame in frames if frame < 4), *[8] * (longer and 0 in frames))
            for frames in asked
        ]
    for frames, count in zip(asked, wanted, strict=True):
        keep = KeepSet(torch.tensor(tokens_in(prompt, *frames)), total)
        encoded.clear()
        found = filling.features(lm, prompt, keep)
        assert sum(encoded) == count, frames
        want = lm.features(prompt)
        torch.testing.assert_close(entering(found)[keep.index], entering(want)[keep.index], rtol=1e-12, atol=1e-12)
        entering(found).zero_()  # what a caller writes must not reach another request


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frames_of_kept_tokens(family):
    prompt = tiny.prompt(family, videos=2)
    total, frames = len(prompt.video_index), sum(grid.frames for grid in prompt.grids)
    for chosen in [(), (0,), (3, 4), tuple(range(frames))]:
        seen = frames_of(prompt, KeepSet(torch.tensor(tokens_in(prompt, *chosen), dtype=torch.int64), total))
        assert seen.nonzero().flatten().tolist() == list(chosen)
        first, there = frames_alone(prompt, seen)
        assert frames_of(prompt, KeepSet(first, total)).equal(seen) and len(there) == total
        assert int(there.sum()) == len(chosen) * prompt.grids[0].per_frame
    merging = KeepSet(torch.tensor([1]), total, torch.eye(total)[:1].to_sparse())
    assert bool(frames_of(prompt, merging).all())


def test_a_prompt_without_a_video_has_no_frames():
    prompt = tiny.prompt("qwen2_5_vl", videos=0)
    lm, store = tiny.draft_of("qwen2_5_vl"), PrefixStore(2**30)
    filling = ReusedDraftPrefill(store, store.keys(lm, prompt, Engine()), Engine(), UniformPruner(), True)
    for _ in range(2):
        assert len(filling.features(lm, prompt, KeepSet.everything(0))) == 0


@pytest.mark.parametrize("engine", [Engine, lambda: GraphsEngine("direct")], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_do_not_depend_on_which_frames_a_draft_saw_before(family, engine):
    prompt = tiny.prompt(family)
    lists = [tokens_in(prompt, *frames) for frames in ((0, 2), (1,), (2, 3), (0, 1, 2, 3))]
    found = []
    for store in (PrefixStore(2**30), None):
        graph = DecodingGraph(
            tiny.model(family), tiny.draft_of(family), Choosing([*lists]), TreeDrafter("2x1"), GreedyVerifier(),
            GenerationOptions(8, 0.5), engine=engine(), prefixes=store,
        )  # fmt: skip
        steps = [list(graph.decode(asking(prompt, 30 + number, 31))) for number in range(4)]
        found.append([(tokens_of(one), [step.accepted for step in one]) for one in steps])
    assert found[0] == found[1]


@pytest.mark.parametrize("words", [1, 3, 70, 300])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_draft_behind_kept_rows_reads_the_question_as_it_reads_answers(family, words, monkeypatch):
    prompt, passes, layers = tiny.prompt(family), [], TextPasses._layers
    draft = tiny.draft_of(family)
    monkeypatch.setattr(
        TextPasses, "_layers", lambda lm, *more: (passes.append(lm) if lm is draft else None, layers(lm, *more))[1]
    )
    found = []
    for store in (PrefixStore(2**30), None):
        graph = DecodingGraph(
            tiny.model(family), draft, UniformPruner(), TreeDrafter("2x1"), GreedyVerifier(), GenerationOptions(8, 0.5),
            engine=GraphsEngine("direct"), prefixes=store,
        )  # fmt: skip
        list(graph.decode(prompt))
        passes.clear()
        steps = list(graph.decode(asking(prompt, *(30 + number % 40 for number in range(words)))))
        found.append((tokens_of(steps), [step.accepted for step in steps]))
        assert bool(passes) == (store is None or words == 300)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_later_question_copies_no_pixels(family, monkeypatch):
    prompt = tiny.prompt(family)
    pixels, copied, clone = prompt.videos[0]["pixels"], [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **more: copied.append(x.data_ptr()) or clone(x, **more))
    graph = DecodingGraph(
        tiny.model(family), tiny.draft_of(family), UniformPruner(), TreeDrafter("2x1"), GreedyVerifier(),
        GenerationOptions(8, 0.5), prefixes=PrefixStore(2**30),
    )  # fmt: skip
    list(graph.decode(prompt))
    assert pixels.data_ptr() in copied
    copied.clear()
    list(graph.decode(asking(prompt, 30, 31)))
    assert pixels.data_ptr() not in copied
