"""Synthetic scenes like those that the embedded pairs were trained on. Rendered on demand: nothing is downloaded."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch

from specvlm.errors import check_choice, check_range
from specvlm.strategies import Dataset, Sample
from specvlm.types import Within
from specvlm.video import synthetic
from specvlm.video.video import Clip

FIRST = 77_000_000  # seed of scene 0, far above all training seeds (see experiments/embedded_pair)


@dataclass(frozen=True)
class SyntheticDataset(Dataset):
    """Held-out scenes of two to five objects, with exact answers; 16 s each, rendered in 0.2 s on one core.

    Scene n does not depend on the fields, and is scene n of experiments/embedded_pair.

    Attributes:
        scenes: Number of scenes.
        first: Number of the first scene.
        ask: `caption` (answers of 55 to 140 words) or `question` (short answers to one of five kinds of question).
    """

    name = "synthetic"
    split = "held_out"
    version = "1"
    scenes: Annotated[int, Within(1, 100_000)] = 24
    first: Annotated[int, Within(0, 10**9)] = 0
    ask: str = "caption"

    def __post_init__(self) -> None:
        check_range("scenes", self.scenes, 1)
        check_range("first", self.first, 0)
        check_choice("ask", self.ask, ("caption", "question"))

    def samples(self) -> Sequence[Sample]:
        return [self._sample(number) for number in range(self.first, self.first + self.scenes)]

    def _sample(self, number: int) -> Sample:
        seed = FIRST + number
        scene = synthetic.sample_scene(seed, min_objects=2)
        if self.ask == "caption":
            question, answer = random.Random(seed).choice(synthetic.CAPTION_QUESTIONS), synthetic.caption(scene)
        else:
            question, answer = random.Random(seed).choice(synthetic.questions(scene, seed))
        meta = {"objects": len(scene.things)}
        return Sample(f"scene-{number:04d}", partial(clip, number), question, answer, meta=meta)


def clip(number: int) -> Clip:
    """Render all frames of scene `number`."""
    scene = synthetic.sample_scene(FIRST + number, min_objects=2)
    frames = torch.from_numpy(synthetic.render(scene, FIRST + number)).permute(0, 3, 1, 2).contiguous()
    times = tuple(place / synthetic.FPS for place in range(len(frames)))
    return Clip(frames, times, synthetic.FPS, f"scene {number}", len(frames), synthetic.FPS)
