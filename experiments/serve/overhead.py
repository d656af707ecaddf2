"""What HTTP adds to a token: streams of one client, and of the Python session, in turn.

The session is in this process, the server in another one. Both decode the same requests, one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import httpx2
import torch

import specvlm
from experiments.serve.__main__ import CHAIN, MODEL, OUT, PATH, QUESTIONS, Asked, started


def by_session(session: specvlm.Session, one: Asked) -> tuple[float, float, int]:
    """Seconds to the first piece and to the end, and tokens, of a stream of the session."""
    begin, first = perf_counter(), 0.0
    with session.stream(one.question, videos=one.clip, frames=8, max_new_tokens=one.length, stop_ids=[]) as pieces:
        for _ in pieces:
            first = first or perf_counter() - begin
        assert pieces.result is not None
        return first, perf_counter() - begin, len(pieces.result.token_ids)


def by_http(client: httpx2.Client, one: Asked) -> tuple[float, float, int]:
    """The same over HTTP."""
    begin, first, tokens = perf_counter(), 0.0, 0
    body = one.body | {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    with client.stream("POST", PATH, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found: Any = json.loads(line[6:])
                if found["choices"] and found["choices"][0]["delta"].get("content"):
                    first = first or perf_counter() - begin
                elif "usage" in found:
                    tokens = found["usage"]["completion_tokens"]
    return first, perf_counter() - begin, tokens


def main(words: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.serve.overhead", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=109)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    session = specvlm.load_pair(MODEL, device="cpu", drafter=CHAIN, pruner={"name": "two_stage", "mass": 0.2})
    one, rows = Asked(QUESTIONS[0], "synthetic_1", args.tokens), list[tuple[Any, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        process, url = started([], scratch)
        with httpx2.Client(base_url=url, timeout=300) as client:
            for number in range(args.repeats + 2):
                ways = [lambda: by_session(session, one), lambda: by_http(client, one)]
                order = (0, 1) if number % 2 else (1, 0)
                found = {way: ways[way]() for way in order}
                assert found[0][2] == found[1][2] == args.tokens
                rows.append((found[0], found[1]))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    rows = rows[2:]
    later = [[(end - first) / (tokens - 1) for first, end, tokens in column] for column in zip(*rows, strict=True)]
    whole = [[end / tokens for _, end, tokens in column] for column in zip(*rows, strict=True)]
    found = {
        "part": "overhead",
        "tokens": args.tokens,
        "repeats": args.repeats,
        "ms_per_token_after_first": {"session": 1000 * median(later[0]), "http": 1000 * median(later[1])},
        "added_ms_per_token": 1000 * median(b - a for a, b in zip(*later, strict=True)),
        "ms_per_token_whole": {"session": 1000 * median(whole[0]), "http": 1000 * median(whole[1])},
        "added_ms_per_token_whole": 1000 * median(b - a for a, b in zip(*whole, strict=True)),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(found))
    with args.out.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
