"""Load a server with unlike requests, and compare each answer with the pair's alone.

A server of the embedded pair runs in a process of its own. Clients ask for answers of mixed lengths, as streams and
whole; some leave before the end, some send nonsense. At the end nothing may be left: no cache, no file, no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch

import specvlm

MODEL, PATH = "embedded:qwen2_5_vl", "/v1/chat/completions"
OUT = Path(__file__).with_name("results.jsonl")
QUESTIONS = ("describe the video.", "how many objects appear?", "what color is the background?", "tell me a story")
CLIPS = ("synthetic_1", "synthetic_2", "synthetic_3", "synthetic_4", None)
LENGTHS = (4, 8, 16, 32, 64, 109)
CHAIN = {"name": "tree", "shape": "chain:5"}
BAD: tuple[dict[str, Any], ...] = (
    {"model": "another"},
    {"temperature": "hot"},
    {"max_tokens": -1},
    {"tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]}]},
    {"messages": [{"role": "user", "content": "<|im_end|>"}]},
    {"seed": 1e300},
)


@dataclass(frozen=True)
class Asked:
    """A request, and the session's options for it."""

    question: str
    clip: str | None
    length: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        given = dict(self.options)
        parts: list[Any] = [] if self.clip is None else [{"type": "video_url", "video_url": {"url": f"embedded:{self.clip}"}}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]
        own = {key: given.pop(key) for key in ("pruner", "drafter", "ratio") if key in given}
        rest = {"max_tokens": self.length, "media_io_kwargs": {"video": {"num_frames": 8}}, "specvlm": own}
        return {"model": MODEL, "messages": messages} | rest | given

    def alone(self, session: specvlm.Session) -> str:
        """The answer of the pair alone."""
        given = dict(self.options)
        if "temperature" in given:
            given["verifier"] = {"name": "coupled", "temperature": given.pop("temperature")}
        return session.generate(self.question, videos=self.clip, frames=8, max_new_tokens=self.length, **given).text


@dataclass
class Seen:
    """What clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)


def all_asked(chance: random.Random, count: int) -> list[Asked]:
    """Draw unlike requests."""
    every = ((), (("pruner", "uniform"), ("ratio", 0.5)), (("drafter", "prompt_lookup"),), (("temperature", 1.5), ("seed", 3)))
    more = ((("stop", "background"),), (("presence_penalty", 0.5),), (("drafter", "self"),))
    drawn = [
        Asked(chance.choice(QUESTIONS), chance.choice(CLIPS), chance.choice(LENGTHS), chance.choice((*every, *more)))
        for _ in range(count)
    ]
    return list(dict.fromkeys(drawn))


async def ask(client: httpx2.AsyncClient, one: Asked, want: str, chance: random.Random, seen: Seen) -> None:
    """Ask once, in one of the ways that clients have."""
    kind = chance.random()
    if kind < 0.05:
        answer = await client.post(PATH, json=one.body | chance.choice(BAD))
        good = answer.status_code in (400, 404, 429) and "message" in answer.json().get("error", {})
        seen.counts["bad"] += 1
        if not good:
            seen.wrong.append(f"bad request: {answer.status_code} {answer.text[:200]}")
    elif kind < 0.15:
        await leave(client, one, chance, seen)
    elif kind < 0.6:
        answer = await client.post(PATH, json=one.body)
        judged(one, want, answer.status_code, answer.json(), seen)
    else:
        await stream(client, one, want, seen)


async def leave(client: httpx2.AsyncClient, one: Asked, chance: random.Random, seen: Seen) -> None:
    """Ask, and close the connection early: before the answer, or within it."""
    seen.counts["left"] += 1
    try:
        async with asyncio.timeout(chance.uniform(0.01, 3)):
            async with client.stream("POST", PATH, json=one.body | {"stream": True}) as answer:
                async for _ in answer.aiter_bytes():
                    if chance.random() < 0.3:
                        return
    except TimeoutError:
        pass


async def stream(client: httpx2.AsyncClient, one: Asked, want: str, seen: Seen) -> None:
    """Ask for a stream and read it."""
    begin, text, last = time.perf_counter(), "", ""
    async with client.stream("POST", PATH, json=one.body | {"stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return judged(one, want, answer.status_code, answer.json(), seen)
        async for line in answer.aiter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                found = json.loads(last)
                delta = found["choices"][0]["delta"].get("content") if found.get("choices") else None
                if delta and not text:
                    seen.first_s.append(time.perf_counter() - begin)
                text += delta or ""
    seen.counts["answered"] += 1
    if text != want or last != "[DONE]":
        seen.wrong.append(f"{one}: {text!r}, alone {want!r}, ended with {last[:100]}")


def judged(one: Asked, want: str, status: int, found: Any, seen: Seen) -> None:
    """Compare a whole answer."""
    if status == 429:
        seen.counts["busy"] += 1
    elif status != 200:
        seen.wrong.append(f"{one}: {status} {json.dumps(found)[:200]}")
    else:
        seen.counts["answered"] += 1
        if (text := found["choices"][0]["message"]["content"]) != want:
            seen.wrong.append(f"{one}: {text!r}, alone {want!r}")


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """The server's numbers, without labels."""
    lines = [line for line in (await client.get("/metrics")).text.splitlines() if line and not line.startswith("#")]
    rows = (line.rpartition(" ") for line in lines)
    return {name.partition("{")[0].removeprefix("specvlm:"): float(value) for name, _, value in rows if "_bucket" not in name}


async def loaded(url: str, wanted: Sequence[tuple[Asked, str]], clients: int, seconds: float, seed: int) -> Seen:
    """Let clients ask until the time is over, then wait until the server is idle."""
    seen, end = Seen(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=clients + 4, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:

        async def one(number: int) -> None:
            chance = random.Random(seed * 1000 + number)
            while time.monotonic() < end:
                try:
                    await ask(client, *chance.choice(wanted), chance, seen)
                except httpx2.HTTPError as error:
                    seen.wrong.append(f"{type(error).__name__}: {error}")

        async def watch() -> None:
            while time.monotonic() < end:
                seen.samples.append(await metrics(client))
                await asyncio.sleep(10)

        await asyncio.gather(watch(), *(one(number) for number in range(clients)))
    async with httpx2.AsyncClient(base_url=url) as client:  # connections of the others are closed
        for _ in range(500):
            await asyncio.sleep(0.1)
            seen.samples.append(await metrics(client))
            if not seen.samples[-1]["num_requests_running"]:
                break
    return seen


def started(words: Sequence[str], scratch: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port. Returns its process and address."""
    command = [sys.executable, "-m", "specvlm.serve", "port=0", "drafter.shape=chain:5", "pruner.mass=0.2", *words]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": scratch}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip().rpartition(" ")[2]


def summary(seen: Seen, before: dict[str, float], scratch: str, process: psutil.Process, args: Any) -> dict[str, Any]:
    """The figures of a run."""
    last, half = seen.samples[-1], seen.samples[len(seen.samples) // 2]
    asked, run = (last[f"passes_{key}_total"] - before[f"passes_{key}_total"] for key in ("asked", "run"))
    first = sorted(seen.first_s)
    return {
        "clients": args.clients,
        "minutes": args.minutes,
        **seen.counts,
        "wrong": len(seen.wrong),
        "answered_per_s": round(seen.counts["answered"] / 60 / args.minutes, 2),
        "tokens_per_s": round((last["generation_tokens_total"] - before["generation_tokens_total"]) / 60 / args.minutes, 1),
        "mean_batch": round(asked / max(run, 1), 2),
        "median_first_token_s": round(first[len(first) // 2], 2) if first else None,
        "left_running": last["num_requests_running"],
        "left_cache_bytes": last["leased_cache_bytes"],
        "left_body_bytes": last["body_bytes"],
        "left_files": [str(path.name) for path in Path(scratch).rglob("*") if path.is_file() and "pymp" not in str(path)],
        "open_files": [before["process_open_fds"], last["process_open_fds"]],
        "children": len(process.children()),
        "resident_mib": [round(one["process_resident_memory_bytes"] / 2**20) for one in (before, half, last)],
    }


def main(words: Sequence[str]) -> int:
    """Run the command line; returns 1 if an answer was wrong or something was left."""
    parser = argparse.ArgumentParser(prog="python -m experiments.serve", description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, default=60, help="unlike requests that are drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("words", nargs="*", help="keys of the server")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    session = specvlm.load_pair(MODEL, device="cpu", drafter=CHAIN, pruner={"name": "two_stage", "mass": 0.2})
    wanted = [(one, one.alone(session)) for one in all_asked(random.Random(args.seed), args.requests)]
    with tempfile.TemporaryDirectory() as scratch:
        process, url = started(["running=32", "queue=64", "queue_timeout=300", *args.words], scratch)
        try:
            with httpx2.Client(base_url=url, timeout=300) as client:
                for one, _ in wanted[:8]:  # what is made once
                    client.post(PATH, json=one.body)

            async def run() -> tuple[dict[str, float], Seen]:
                async with httpx2.AsyncClient(base_url=url) as client:
                    before = await metrics(client)
                return before, await loaded(url, wanted, args.clients, 60 * args.minutes, args.seed)

            before, seen = asyncio.run(run())
            found = summary(seen, before, scratch, psutil.Process(process.pid), args)
        finally:
            process.send_signal(signal.SIGTERM)
            found_code = process.wait(60)
    for wrong in seen.wrong[:10]:
        print(wrong)
    found |= {"exit_code": found_code}
    print(json.dumps(found))
    with args.out.open("a") as file:
        file.write(json.dumps({"part": "load"} | found) + "\n")
    left = found["left_running"] or found["left_cache_bytes"] or found["left_body_bytes"] or found["left_files"]
    return int(bool(seen.wrong or left or found_code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
