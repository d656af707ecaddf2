"""Serve shapes with random weights and given acceptance on one GPU: videos, three questions each, over HTTP.

The server runs in a thread of this process; its clients too. Each client takes a video and asks its questions one after
another. Prompts are made beforehand and chosen by the question's text, so that reading videos does not count. Guesses
are right by chance (see `experiments.batch.drafter`); the answers that they follow are those of the first part.

Parts: `speculate=false`, then with guesses, both with as many clients; then the target alone, one request after another,
without reuse, for a few requests, scaled to all.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import json
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2
import torch

from experiments.batch.drafter import ChanceDrafter
from experiments.gpu_pair.__main__ import commit_of
from experiments.gpu_pair.shapes import build, pair_of, prompt_of
from experiments.serve.__main__ import OUT, PATH
from specvlm.decoding.loop import autoregressive
from specvlm.decoding.scheduler import Decoding
from specvlm.engine import engine_for
from specvlm.models import memory_plan
from specvlm.models.families import find
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.results import metrics
from specvlm.serve.app import App
from specvlm.serve.body import Body
from specvlm.serve.chat import Chat
from specvlm.serve.chat_request import ChatRequest
from specvlm.serve.server import Server, bound
from specvlm.serve.settings import Keys, Settings
from specvlm.session.call import Requests
from specvlm.session.inputs import Reading
from specvlm.session.options import Options
from specvlm.session.session import Asked, Session
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import VideoPrompt

MODEL = "shapes"


class Words:
    """A tokenizer that spells each token as its number."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f" {int(token)}" for token in tokens)


class NoWatch:
    """Takes the place of the watch over plugins, which would read all weights for each request."""

    def over(self, work: Decoding, strategies: Sequence[Any]) -> Decoding:
        return work


class Bench(Chat):
    """The endpoint of chat completions, with prompts that are made beforehand.

    Attributes:
        known: Answers by video and question, once they are known.
    """

    def __init__(self, session: Session, settings: Settings, prompts: dict[tuple[int, int], VideoPrompt], args: Any) -> None:
        super().__init__(session, settings, MODEL)
        self.prompts, self.inner, self.chance = prompts, TreeDrafter(args.tree), args.chance
        self.known: dict[tuple[int, int], tuple[int, ...]] = {}

    def prepare(self, request: ChatRequest, body: Body, name: str) -> Asked:
        """Take the prompt that the question names."""
        video, question = map(int, re.findall(r"\d+", request.messages[-1]["content"]))
        key = video, question
        drafter = ChanceDrafter(self.inner, self.known.get(key, ()), accepted=0.0, chance=self.chance)
        options = self.session.options.asked(request.options | {"drafter": drafter})
        return Asked(options, self.session.graph(options), Reading(self.prompts[key], None))


@dataclass
class Log:
    """What clients saw: when each request was sent, and each piece of its answer with its tokens."""

    sent: dict[tuple[int, int], float] = field(default_factory=dict)
    pieces: dict[tuple[int, int], list[tuple[float, int]]] = field(default_factory=dict)
    answers: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """Tokens per second over all, and while no request waits for its first token."""
        start, end = min(self.sent.values()), max(pieces[-1][0] for pieces in self.pieces.values())
        tokens = sum(count for pieces in self.pieces.values() for _, count in pieces)
        waits = sorted((self.sent[key], pieces[0][0]) for key, pieces in self.pieces.items())
        decoding, at = list[tuple[float, float]](), start
        for begin, first in waits:
            if begin > at:
                decoding.append((at, begin))
            at = max(at, first)
        decoding.append((at, end))
        spans = sum(stop - begin for begin, stop in decoding)
        times = [(when, count) for pieces in self.pieces.values() for when, count in pieces[1:]]
        made = sum(count for when, count in times if any(begin <= when < stop for begin, stop in decoding))
        firsts = sorted(first - begin for begin, first in waits)
        return {
            "tokens": tokens,
            "wall_s": end - start,
            "tokens_per_s": tokens / (end - start),
            "decode_tokens_per_s": made / spans if spans else None,
            "decoding_alone_s": spans,
            "median_first_token_s": firsts[len(firsts) // 2],
        }


async def client(http: httpx2.AsyncClient, video: int, questions: int, args: argparse.Namespace, own: Any, log: Log) -> None:
    """Ask all questions about a video, one after another."""
    for question in range(questions):
        key = video, question
        content = f"video {video} question {question}"
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": args.new}
        log.sent[key], found = perf_counter(), list[tuple[float, int]]()
        text = ""
        async with http.stream("POST", PATH, json=body | {"specvlm": own}) as answer:
            if answer.status_code != 200:
                raise RuntimeError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    value = json.loads(line[6:])
                    if "error" in value:
                        raise RuntimeError(str(value))
                    piece = value["choices"][0]["delta"].get("content") or ""
                    if piece:
                        found.append((perf_counter(), piece.count(" ")))
                        text += piece
        log.pieces[key], log.answers[key] = found, tuple(map(int, text.split()))


async def asked(url: str, args: argparse.Namespace, own: Any) -> Log:
    """Let all clients ask: as many at once as there are; the videos go round."""
    log, waiting = Log(), list(range(args.videos))
    limits = httpx2.Limits(max_connections=args.clients)
    async with httpx2.AsyncClient(base_url=url, timeout=3600, limits=limits) as http:

        async def one() -> None:
            while waiting:
                await client(http, waiting.pop(0), args.questions, args, own, log)

        await asyncio.gather(*(one() for _ in range(args.clients)))
    return log


def prompts_of(target: VideoLM, shape: Any, args: argparse.Namespace) -> dict[tuple[int, int], VideoPrompt]:
    """Make the prompts. Those of a video share its tensors and all tokens before the question."""
    found = {}
    for video in range(args.videos):
        first = prompt_of(target, shape, args.video_tokens, True, video)
        for question in range(args.questions):
            tokens = first.tokens.clone()
            tokens[first.cut :] = tokens[first.cut :].roll(question)
            found[video, question] = VideoPrompt(tokens, first.video_index, first.grids, first.videos)
    return found


def alone(target: VideoLM, prompts: Sequence[VideoPrompt], new: int, engine: Any, of: int) -> dict[str, Any]:
    """One request after another, by the target alone, without reuse."""
    caches, walls, decodes = CachePool(), list[float](), list[float]()
    for number, prompt in enumerate([prompts[0], *prompts]):
        begin, first, tokens = perf_counter(), 0.0, 0
        for step in autoregressive(target, prompt, new, GreedyVerifier(), caches, engine):
            tokens += len(step.tokens)
            first = first or perf_counter()
        if number:  # the first one captures
            walls.append(perf_counter() - begin)
            decodes.append((tokens - 1) / (perf_counter() - first))
    mean = sum(walls) / len(walls)
    return {
        "requests_timed": len(walls),
        "scaled_to": of,
        "wall_s": mean * of,
        "tokens_per_s": new / mean,
        "decode_tokens_per_s": sum(decodes) / len(decodes),
    }


def session_of(args: argparse.Namespace) -> tuple[Session, Any]:
    """Build the pair with random weights. Returns its session, and the target's shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pair = pair_of(args.shape)
    assert pair.draft is not None
    with torch.inference_mode():
        sides = ((pair.target, "bf16"), (pair.draft, args.draft_weights))
        target, draft = (build(shape, find(shape.family), device, dtype, weights) for shape, weights in sides)
    target.tokenizer = draft.tokenizer = Words()
    options = Options(pruner="uniform", drafter={"name": "tree", "shape": args.tree}, ratio=args.ratio, max_new_tokens=args.new)
    vocabulary = min(target.vocabulary, draft.vocabulary)
    session = Session(target, draft, vocabulary, engine_for("auto", device), options)
    session.requests = Requests(session.scheduler, session.caches, NoWatch())  # type: ignore[arg-type]
    return session, pair.target


def main(words: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.serve.shapes", description=__doc__)
    parser.add_argument("--shape", default="qwen2_5_vl_32b_7b", help="pair of experiments.gpu_pair (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--video-tokens", type=int, default=16384)
    parser.add_argument("--new", type=int, default=512, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--tree", default="chain:4")
    parser.add_argument("--ratio", type=float, default=0.9)
    parser.add_argument("--chance", type=float, default=0.8, help="chance that a guess is right (default: %(default)s)")
    parser.add_argument("--draft-weights", default="bf16", help="bf16, fp8, int8 or int4 (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=6, help="requests timed one after another; 0: none (default: %(default)s)")
    parser.add_argument("--commit", default="", help="if git is not available")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    session, shape = session_of(args)
    prompts = prompts_of(session.target, shape, args)
    settings = Settings(port=0, running=args.clients, queue=args.clients, queue_timeout=3600, write_timeout=3600)
    bench = Bench(session, settings, prompts, args)
    server, taken = Server(App(bench, Keys(None, {}))), bound(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.1)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    device = session.target.device
    about = {
        "part": "shapes",
        **{key: value for key, value in vars(args).items() if key not in ("out", "commit")},
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit_of(),
        "versions": {k: v for k, v in metrics.versions().items() if k in ("python", "torch", "transformers")},
    }
    rows = [measured("alone", url, args, {"speculate": False}, session, bench)]
    for name in ("warm-up", "speculative"):  # the first one captures
        rows.append(measured(name, url, args, {}, session, bench))
    if args.timed:
        some = [prompts[key] for key in sorted(prompts)][: args.timed]
        rows.append({"way": "one after another"} | alone(session.target, some, args.new, session.engine, len(prompts)))
    base = rows[0]
    for row in rows[1:]:
        row["whole_over_alone"] = row["tokens_per_s"] / base["tokens_per_s"]
        row["decode_over_alone"] = (row["decode_tokens_per_s"] or 0) / (base["decode_tokens_per_s"] or 1)
    with args.out.open("a") as file:
        for row in rows:
            file.write(json.dumps(about | {"peak_gib": memory_plan.peak_bytes(device) / 2**30} | row) + "\n")
    server.should_exit = True
    thread.join(30)
    return 0


def measured(name: str, url: str, args: argparse.Namespace, own: Any, session: Session, bench: Bench) -> dict[str, Any]:
    """Let all clients ask once, twice for the target alone, whose first round captures. Answers must not change."""
    before = session.scheduler.asked, session.scheduler.run
    log = asyncio.run(asked(url, args, own))
    if name == "alone":
        bench.known = dict(log.answers)
        gc.collect()
        before = session.scheduler.asked, session.scheduler.run
        log = asyncio.run(asked(url, args, own))
    run = session.scheduler.run - before[1]
    same = sum(bench.known[key] == answer for key, answer in log.answers.items())
    found = {"way": name, **log.figures, "mean_batch": (session.scheduler.asked - before[0]) / max(run, 1)}
    found |= {"same_answers": same, "answers": len(log.answers)}
    print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
