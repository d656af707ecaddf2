"""Data sets: the promises of the interface, and the one that needs no files."""

from __future__ import annotations

import pickle

import pytest
import torch

from experiments.embedded_pair.evaluate import DRAFTS, scene_request
from specvlm.app.compose import compose
from specvlm.config import model_folder
from specvlm.errors import UserError
from specvlm.models.load import skeleton
from specvlm.strategies import registry
from specvlm.strategies.datasets.synthetic import SyntheticDataset, clip
from specvlm.video.video import probe, read_video


def test_no_data_set_is_the_default_and_one_is_chosen_by_name():
    assert compose().dataset is None
    chosen = compose(["dataset=synthetic", "dataset.scenes=3", "dataset.first=7"]).dataset
    assert registry.build("dataset", chosen) == SyntheticDataset(scenes=3, first=7)
    with pytest.raises(UserError, match='there is no dataset "synthetik".*Did you mean "synthetic"?'):
        compose(["dataset=synthetik"])
    with pytest.raises(UserError, match="scenes must be at least 1, got 0"):
        compose(["dataset=synthetic", "dataset.scenes=0"])


def test_scenes_are_the_same_in_every_data_set_and_survive_a_process():
    whole, part = SyntheticDataset(scenes=6).samples(), SyntheticDataset(scenes=2, first=3).samples()
    assert [sample.id for sample in whole] == [f"scene-{number:04d}" for number in range(6)]
    assert [(s.id, s.question, s.answer, s.meta) for s in part] == [(s.id, s.question, s.answer, s.meta) for s in whole[3:5]]
    assert all(2 <= sample.meta["objects"] <= 5 for sample in whole)
    again = pickle.loads(pickle.dumps(part[0]))
    assert torch.equal(again.video().frames, whole[3].video().frames)


@pytest.mark.parametrize("ask", ["caption", "question"])
@pytest.mark.parametrize("family", DRAFTS)
def test_a_scene_is_the_one_that_the_experiments_measured(family, ask):
    lm = skeleton(model_folder(f"embedded:{family}/target"))
    theirs, gold = scene_request(lm, family, ask, 5)
    sample = SyntheticDataset(scenes=1, first=5, ask=ask).samples()[0]
    made = sample.video()
    ours = lm.prompt(sample.question, [read_video(made, **lm.sampling(probe(made)))])
    assert gold == sample.answer and torch.equal(theirs.tokens, ours.tokens)
    assert torch.equal(theirs.videos[0]["pixels"], ours.videos[0]["pixels"])


def test_a_clip_in_memory_is_read_as_a_file_of_its_frames_would_be():
    made = clip(0)
    some = read_video(made, frames=4, start=8)
    assert torch.equal(some.frames, made.frames[[16, 20, 24, 28]]) and some.times == (8.0, 10.0, 12.0, 14.0)
    assert some.fps == 0.5 and some.origin is None and probe(made).duration == 16
    with pytest.raises(UserError, match="scene 0 has 32 frames, fewer than the 40 asked for"):
        read_video(made, frames=40)
