"""Sessions of the embedded pairs, and clips short enough for tests."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from threading import Thread
from time import monotonic, sleep

import torch
from towers import remember_features

from specvlm import Clip, Session, load_pair, read_video
from specvlm.video.clips import find_clip

FAMILIES = ("qwen2_5_vl", "llava_onevision", "qwen3_vl")
CHAIN = {"name": "tree", "shape": "chain:5"}
QUESTION = "describe the video."
COUPLED = {"name": "coupled", "temperature": 1.0}
# Unlike requests: clip, question, options.
UNLIKE = [
    ("synthetic_1", QUESTION, {"max_new_tokens": 24}),
    ("synthetic_2", "how many objects appear?", {"max_new_tokens": 12, "pruner": "uniform", "ratio": 0.5}),
    ("synthetic_3", QUESTION, {"max_new_tokens": 20, "drafter": "prompt_lookup"}),
    ("synthetic_4", QUESTION, {"max_new_tokens": 16, "verifier": COUPLED, "seed": 3}),
    ("synthetic_1", "how many objects remain at the end?", {"max_new_tokens": 10, "drafter": "self"}),
    ("synthetic_2", QUESTION, {"max_new_tokens": 18, "stop": "background"}),
    ("synthetic_3", QUESTION, {"max_new_tokens": 14, "presence_penalty": 0.5, "logprobs": 1}),
    ("synthetic_4", QUESTION, {"max_new_tokens": 22, "verifier": {"name": "sampling", "temperature": 0.7}, "seed": 5}),
]

SEEN: dict[tuple[str, str], dict] = defaultdict(dict)  # features of what a model has looked at, whatever the session


def new_session(family: str = "qwen2_5_vl", **options: object) -> Session:
    torch.set_num_threads(1)
    defaults = {"drafter": CHAIN, "pruner": {"name": "two_stage", "mass": 0.2}, "max_new_tokens": 16}
    made = load_pair(f"embedded:{family}", device="cpu", **(defaults | options))
    for name, lm in (("target", made.target), ("draft", made.draft)):
        remember_features(lm, SEEN[family, name])
    return made


session = cache(new_session)


@cache
def clip(name: str = "synthetic_1", frames: int = 8) -> Clip:
    return read_video(find_clip(name), frames=frames)


def leased(of: Session) -> list[str]:
    """Roles of the caches that requests hold."""
    return [role for role, _ in of.caches._leased]


@contextmanager
def all_at_once(of, count):
    """Let no call run before so many are submitted, so that they share passes on any machine."""

    def submitted():
        end = monotonic() + 60
        while len(of.scheduler._new) < count and monotonic() < end:
            sleep(0.01)

    waiter = Thread(target=of.scheduler.between, args=(submitted,))
    waiter.start()
    while of.scheduler._runner is None:
        sleep(0.001)
    yield
    waiter.join()
