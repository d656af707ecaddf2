"""A replica: a process of Ray that runs the pair, and answers requests from the front, which is our HTTP server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import torch
from ray import serve

from specvlm.config import RunConfig
from specvlm.serve.body import Message
from specvlm.serve.command import endpoint
from specvlm.serve.settings import Settings

SCOPE: dict[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "path": "/v1/chat/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


class Replica:
    """Answers requests with the same endpoint as a server without replicas. Ray creates one in each replica's process.

    Args:
        cfg: The pair and its defaults.
        settings: Limits of requests.
        model: Name of the model in requests.
        folder: Folder where the command was called. Relative paths start from it.
    """

    def __init__(self, cfg: RunConfig, settings: Settings, model: str, folder: str) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        with suppress(OSError):  # other machines need not have it
            os.chdir(folder)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self._chat = endpoint(cfg, settings, model)

    async def answer(self, raw: bytes, waited_s: float) -> AsyncIterator[Any]:
        """Answer a request.

        Args:
            raw: The request's body.
            waited_s: Seconds that it has waited for a replica.

        Yields:
            First the replica's name, without delay, then the ASGI messages of the answer as they come. Closing the
            iterator ends the request.
        """
        yield self._name
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts, gone = [raw], asyncio.Event()

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = SCOPE | {"state": {"waited_s": waited_s}}
        work = asyncio.ensure_future(self._chat(scope, receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (one := await messages.get()) is not None:
                yield one
            await work
        finally:
            gone.set()
            await asyncio.wait([work])

    async def defaults(self) -> dict[str, Any]:
        """Return the default options of requests."""
        return await self._chat.defaults()

    async def view(self, name: str) -> dict[str, Any] | None:
        """Return what the drafter saw for the answer with this id; None if that is not kept any more."""
        return await self._chat.view(name)

    async def numbers(self) -> tuple[str, bytes]:
        """Return the replica's name, and its metrics in Prometheus' text format."""
        return self._name, await self._chat.numbers()
