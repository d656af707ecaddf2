"""Servers for tests: in a thread of this process, so that answers can be compared with the session's, or in a process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx2
from session_pairs import QUESTION, leased, session

from specvlm.serve.app import App
from specvlm.serve.chat import Chat
from specvlm.serve.server import Server, bound
from specvlm.serve.settings import Keys, Settings
from specvlm.video.clips import find_clip

MODEL = "embedded:qwen2_5_vl"
WORDS = ("port=0", "drafter.shape=chain:5", "pruner.mass=0.2")
PATH = "/v1/chat/completions"
FEW = {"media_io_kwargs": {"video": {"num_frames": 4}}}


class Live:
    """A server in a thread, on a port of its own."""

    def __init__(self, *words: str, of: Any = None, variables: dict[str, str] | None = None) -> None:
        self.session = of or session()
        self.settings = Settings.of_words(["port=0", *words])
        self.app = App(Chat(self.session, self.settings, MODEL), Keys(self.settings.api_keys, variables or {}))
        self.server, taken = Server(self.app), bound(self.settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [taken]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=180)

    @property
    def chat(self) -> Any:
        return self.app.chat

    def ask(self, value: Any = None, **options: Any) -> httpx2.Response:
        return self.client.post(PATH, json=value if value is not None else body(**options))

    def events(self, **options: Any) -> list[Any]:
        """The events of a stream, parsed; the last one is "[DONE]" unless it failed."""
        return events_of(self.ask(stream=True, **options).text)

    def idle(self) -> bool:
        """Whether nothing of a request is left."""
        admission = self.chat.admission
        return not (admission.running or admission.waiting or admission.held_bytes or leased(self.session))

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(90)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def served(*words: str, **given: Any) -> Iterator[Live]:
    found = Live(*words, **given)
    try:
        yield found
    finally:
        found.stop()


@cache
def live() -> Live:
    """The server that most tests ask."""
    return Live()


def body(text: str = QUESTION, video: str | None = "embedded:synthetic_1", **options: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [] if video is None else [{"type": "video_url", "video_url": {"url": video}}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8} | FEW | options


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for one in events if one != "[DONE]" for choice in one.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)


def data_url(name: str = "synthetic_1", kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(find_clip(name).read_bytes()).decode()}"


def until(holds: Any, seconds: float = 90) -> bool:
    """Wait until something holds; returns whether it did in time."""
    waiter = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if holds():
            return True
        waiter.wait(0.02)
    return bool(holds())


class Process:
    """A server in a process of its own."""

    def __init__(self, *words: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "specvlm.serve", *WORDS, *words]
        path = os.pathsep.join(sys.path)
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (env or {})
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.strip().rpartition(" ")[2]
        self.client = httpx2.Client(base_url=self.url, timeout=180) if self.url else None

    def end(self, sig: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and wait. Returns the exit code and what was printed as errors."""
        self.process.send_signal(sig)
        _, errors = self.process.communicate(timeout=180)
        return self.process.returncode, errors

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def run(work: Any) -> Any:
    return asyncio.run(work)
