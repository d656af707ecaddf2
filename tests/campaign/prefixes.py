"""Chats, questions about one video and their neighbours: what is kept of prompts changes no answer.

Sessions of the embedded pairs in float32 on the eager engine, on a CPU. Each request is also asked of a session that
keeps nothing. An attack is a chat of two to six turns, with edits of its history; three questions about a video, of
equal length too; a store in which hardly anything has room; a neighbour that runs; neighbours that drive each other's
prompts out; or a file replaced under its name.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from specvlm import load_pair
from specvlm.decoding.prefixes import PrefixStore
from specvlm.models.known_videos import KnownVideos
from specvlm.session.session import Session
from specvlm.video.clips import find_clip

COUNT, SAMPLE = 600, 6  # 200 chats among them, and 150 videos with three questions (`KINDS`)

FAMILIES = ("qwen2_5_vl", "llava_onevision", "qwen3_vl")
CLIPS = ("synthetic_1", "synthetic_2", "synthetic_3", "synthetic_4", "bbb_apple")
QUESTIONS = (
    *("describe the video.", "what color is the first object?", "how many objects are there?", "does a star appear?"),
    *("how many objects appear?", "what color is the background?", "how many objects remain at the end?"),
)
SAME_LENGTH = ("what color is the first object?", "what shape is the first object?", "what color is the third object?")
CHOICES: dict[str, tuple[Any, ...]] = {
    "pruner": ("two_stage", "uniform", "none", "fastv", "random", "verifier_attention"),
    "drafter": ({"name": "tree", "shape": "chain:3"}, "tree", "prompt_lookup", "self"),
    "verifier": ("greedy", "greedy", {"name": "coupled", "temperature": 0.8}),
    "ratio": (0.5, 0.9),
}
Ask = dict[str, Any]


@cache
def plain(family: str) -> Session:
    """Load a pair as a session that keeps nothing."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and the fork of a chat template do not go together
    return load_pair(f"embedded:{family}", device="cpu", prefixes=False)


def keeping(family: str, size: int) -> Session:
    """Make a session of the same models that keeps `size` bytes."""
    own = plain(family)
    session = load_pair(own.target, own.draft, prefixes=False)
    session.prefixes = session.requests.prefixes = PrefixStore(size)
    session.videos = KnownVideos()
    return session


@cache
def bytes_of_a_prompt(family: str) -> int:
    """Bytes that a session keeps of one prompt."""
    session = keeping(family, 2**40)
    session.generate(QUESTIONS[0], videos="synthetic_1", frames=8, max_new_tokens=4)
    assert session.prefixes is not None
    return session.prefixes.shelf.nbytes()


def options(chance: random.Random) -> Ask:
    chosen = {name: chance.choice(values) for name, values in CHOICES.items()}
    return chosen | {"max_new_tokens": chance.randint(1, 10), "seed": chance.randrange(5)}


def video(chance: random.Random) -> Ask:
    """A file with some number of frames, or frames in memory."""
    if chance.random() < 0.6:
        return {"videos": chance.choice(CLIPS), "frames": chance.choice((4, 6, 8))}
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    return {"videos": torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)}


def compared(session: Session, other: Session, asked: Ask, found: list[str], what: str) -> str:
    """Ask both sessions, and note a difference. Returns the answer's text."""
    want = other.generate(**asked)
    got = session.generate(**asked)
    kept = [one.statistics["kept_tokens"] for one in (got, want)]
    if got.token_ids != want.token_ids or kept[0] != kept[1]:
        found.append(f"{what}: {got.token_ids} (kept {kept[0]}), without reuse {want.token_ids} (kept {kept[1]})")
    return want.text


def chat(chance: random.Random, family: str, found: list[str], number: int) -> None:
    session, given = keeping(family, 2**40), video(chance)
    videos, frames = given.pop("videos"), given
    first = [{"type": "video", "video": videos}, {"type": "text", "text": chance.choice(QUESTIONS)}]
    messages: list[Any] = [{"role": "user", "content": first}]
    for turn in range(chance.randint(2, 6)):
        asked = {"prompt": messages, **frames, **options(chance)}
        text = compared(session, plain(family), asked, found, f"attack {number}, {family}, turn {turn}")
        messages = [*messages, {"role": "assistant", "content": text.strip() or "x"}]
        if chance.random() < 0.3:  # an edit of the history
            at = chance.randrange(len(messages))
            content = "no." if at else [first[0], {"type": "text", "text": chance.choice(QUESTIONS)}]
            messages = [*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :]]
        more = [{"type": "text", "text": chance.choice(QUESTIONS)}]
        if chance.random() < 0.1 and family != "llava_onevision":  # Hugging Face stacks its videos
            more = [{"type": "video", "video": chance.choice(CLIPS)}, *more]
            frames = {"frames": 4} if isinstance(videos, str) else frames
        if any(part["type"] == "video" for part in more) and not isinstance(videos, str):
            more = more[1:]
        messages = [*messages, {"role": "user", "content": more}]


def questions(chance: random.Random, family: str, found: list[str], number: int) -> None:
    session, given, chosen = keeping(family, 2**40), video(chance), options(chance)
    for question in chance.sample(chance.choice((QUESTIONS, SAME_LENGTH)), 3):
        asked = {"prompt": question, **given, **chosen}
        compared(session, plain(family), asked, found, f"attack {number}, {family}, {question!r}")
    if session.prefixes is not None and session.prefixes.hits < 2:
        found.append(f"attack {number}, {family}: {session.prefixes.hits} of two later questions found their video")


def evictions(chance: random.Random, family: str, found: list[str], number: int) -> None:
    session = keeping(family, int(bytes_of_a_prompt(family) * chance.uniform(0.3, 2.5)))
    shelf = session.prefixes.shelf  # type: ignore[union-attr]
    shelf.host_bytes = chance.choice((0, shelf.device_bytes))
    given = [video(chance) for _ in range(3)]
    for turn in range(8):
        asked = {"prompt": chance.choice(QUESTIONS), **chance.choice(given), **options(chance)}
        compared(session, plain(family), asked, found, f"attack {number}, {family}, request {turn}")
        if shelf.nbytes() > shelf.device_bytes or shelf.nbytes(on_host=True) > shelf.host_bytes:
            found.append(f"attack {number}: {shelf.nbytes()} bytes are kept, {shelf.device_bytes} may be")


def neighbours(chance: random.Random, family: str, found: list[str], number: int, share: float = 1e6) -> None:
    session = keeping(family, int(bytes_of_a_prompt(family) * share))
    given = [video(chance) for _ in range(1 if share > 10 else 3)]
    asked = [{"prompt": chance.choice(QUESTIONS), **chance.choice(given), **options(chance)} for _ in range(4)]
    want = [plain(family).generate(**one).token_ids for one in asked]
    with ThreadPoolExecutor(4) as pool:
        got = [one.token_ids for one in pool.map(lambda one: session.generate(**one), asked)]
    if got != want:
        found.append(f"attack {number}, {family}: together {got}, alone {want}")
    users = [item.users for item in session.prefixes.shelf.items if item.users]  # type: ignore[union-attr]
    if users or session.prefixes._claims:  # type: ignore[union-attr]
        found.append(f"attack {number}, {family}: {len(users)} entries are still in use")


def evicted_neighbours(chance: random.Random, family: str, found: list[str], number: int) -> None:
    neighbours(chance, family, found, number, share=chance.uniform(0.5, 1.5))


def replaced(chance: random.Random, family: str, found: list[str], number: int) -> None:
    session = keeping(family, 2**40)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "clip.mp4")
        for turn, name in enumerate(chance.sample(CLIPS, 3)):
            if turn and chance.random() < 0.5:
                path.write_bytes(find_clip(name).read_bytes())
            else:
                shutil.copy(find_clip(name), path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
            if chance.random() < 0.5:  # else it was written just now
                time.sleep(0.15)
            for question in chance.sample(QUESTIONS, 2):
                asked = {"prompt": question, "videos": str(path), "frames": 4, **options(chance)}
                compared(session, plain(family), asked, found, f"attack {number}, {family}, file {turn}")


KINDS: tuple[Callable[[random.Random, str, list[str], int], None], ...] = (
    *(chat, questions, evictions, chat, neighbours, replaced, chat, questions, evicted_neighbours),
    *(chat, questions, evictions),
)


def run(count: int, seed: int) -> list[str]:
    found: list[str] = []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        KINDS[number % len(KINDS)](chance, chance.choice(FAMILIES), found, number)
    return found
