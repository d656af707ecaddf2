"""Endless fresh training rows from worker processes, seeded by step, so a resumed run sees the rows it would have seen."""

import collections
import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.embedded_pair.layout import TEXT_ROWS
from experiments.embedded_pair.tokenizer import END, PAD, encode, first_question, next_question
from specvlm.video import synthetic

LENGTHS = {16: 0.7, 12: 0.1, 8: 0.1, 4: 0.1}  # share of steps by video length in seconds, after the vision stage


@dataclass(frozen=True)
class Batch:
    """Rows of one video length. `asked` counts the text rows of the first question; `count_row` is its last row if it asks
    for a caption, else -1."""

    seconds: int
    objects: Tensor  # float32 (B, K, C)
    backgrounds: Tensor  # int64 (B, 3)
    ids: Tensor  # int64 (B, R), text after the video
    answer: Tensor  # float32 (B, R), 1 on answer tokens
    asked: Tensor  # int64 (B,)
    count_row: Tensor  # int64 (B,)

    def to(self, device: torch.device) -> "Batch":
        move = lambda v: v.pin_memory().to(device, non_blocking=True)  # noqa: E731
        return Batch(**{k: move(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def conversation(scene: synthetic.Scene, rng: random.Random) -> list[tuple[str, str]]:
    """A caption and two questions, the caption first in 65 % of the rows."""
    describe = [(rng.choice(synthetic.CAPTION_QUESTIONS), synthetic.caption(scene))]
    asked = synthetic.questions(scene, rng)[:2]
    return describe + asked if rng.random() < 0.65 else asked + describe


def make_rows(family: str, seed: int, step: int, size: int, lengths: dict[int, float]) -> tuple:
    """The numpy form of a batch. `size` counts videos of 16 s; shorter ones come in larger batches of the same frame count,
    so the vision tower compiles for one shape."""
    rng = random.Random(synthetic.HELD_OUT * (1 + seed) + step)
    seconds = rng.choices(list(lengths), list(lengths.values()))[0]
    count = size * synthetic.SECONDS // seconds
    ids, answer = np.full((count, TEXT_ROWS), PAD, np.int64), np.zeros((count, TEXT_ROWS), np.float32)
    asked, count_row, scenes = np.zeros(count, np.int64), np.full(count, -1, np.int64), []
    for b in range(count):
        scene = synthetic.sample_scene(rng, seconds)
        scenes.append(scene)
        tokens, marks = [], []
        for turn, (question, reply) in enumerate(conversation(scene, rng)):
            head = next_question(question) if turn else first_question(family, question)
            tail = [*encode(reply), END]
            tokens += head + tail
            marks += [0] * len(head) + [1] * len(tail)
            if turn == 0:
                asked[b] = len(head)
                count_row[b] = len(head) - 1 if question in synthetic.CAPTION_QUESTIONS else -1
        kept = min(len(tokens), TEXT_ROWS)
        ids[b, :kept], answer[b, :kept] = tokens[:kept], marks[:kept]
    return (seconds, *synthetic.pack(scenes), ids, answer, asked, count_row)


class Feeder:
    """Batches for steps `first`, `first + 1`, ... prepared ahead by `workers` processes (0: in this one)."""

    def __init__(self, family: str, seed: int, size: int, first: int, workers: int, lengths: dict[int, float]):
        self._args = lambda step: (family, seed, step, size, lengths)
        self._step, self._ready = first, collections.deque()
        # Forked, so that no worker imports everything again: build the feeder before the process uses CUDA or torch threads.
        # The workers themselves run plain Python and numpy.
        self._pool = multiprocessing.get_context("fork").Pool(workers) if workers else None
        for _ in range(3 * workers):
            self._push()

    def _push(self) -> None:
        self._ready.append(self._pool.apply_async(make_rows, self._args(self._step)))
        self._step += 1

    def next(self, device: torch.device) -> Batch:
        if self._pool is None:
            rows = make_rows(*self._args(self._step))
            self._step += 1
        else:
            rows = self._ready.popleft().get()
            self._push()
        batch = Batch(rows[0], *map(torch.from_numpy, rows[1:]))
        return batch.to(device) if device.type == "cuda" else batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
