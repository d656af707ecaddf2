"""Draft in a separate process, which drafts ahead while the target's processes check.

The target's processes wait only for trees, so an engine that cannot submit a check, such as the eager one on a CPU,
gains too. Messages are pickled between a process and the one that it started; nothing else can write to the pipe.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from specvlm.decoding.loop import generator_for
from specvlm.engine import Engine
from specvlm.errors import UserError, one_line
from specvlm.models.kv_cache import CachePool
from specvlm.models.passes import driven
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import DraftContext, Drafter, DraftSession, Sampling
from specvlm.types import DraftTree, KeepSet, TreeShape, Verdict, VideoPrompt

HOST = torch.device("cpu")
Models = tuple[VideoLM, VideoLM]  # target, which may be a skeleton, and draft


@dataclass(frozen=True)
class Begin:
    """Message that begins a request: its number, the drafter, and fields of its `DraftContext`.

    `state` is the state of the request's random generator.
    """

    number: int
    drafter: Drafter
    prompt: VideoPrompt
    keep: KeepSet
    bonus: int
    positions: str
    max_new_tokens: int
    vocabulary: int
    sampling: Sampling
    state: torch.Tensor
    seed: int | None


@dataclass(frozen=True)
class Asked:
    """Message that asks for a request's next tree, given the verdict on its last one. The answer repeats `number`."""

    request: int
    number: int
    last: Verdict | None


@dataclass(frozen=True)
class Answer:
    """Reply to `Asked`: a tree on the host, and how many levels were drafted ahead; or `why` there is no tree."""

    number: int
    tree: DraftTree | None = None
    ahead: int | None = None
    why: str = ""


class RemoteDrafter(Drafter):
    """Runs a drafter's sessions in another process. The sessions get no signals of the target.

    Args:
        inner: The drafter.
        link: Connection to a process that runs `serve`.

    Raises:
        UserError: The drafter needs signals, runs no draft model, or chooses its shapes by costs.
    """

    name = "remote"
    model = "draft"

    def __init__(self, inner: Drafter, link: Connection) -> None:
        if inner.needs or inner.model != "draft":
            raise UserError(f"drafter={inner.name} cannot draft in a separate process: it needs the target")
        if inner.adapts:
            raise UserError(
                f"drafter={inner.name} shape=auto needs costs, which are not known in another process: give a shape"
            )
        self.inner, self.link = inner, link

    @property
    def max_nodes(self) -> int:
        return self.inner.max_nodes

    @property
    def fixed(self) -> TreeShape | None:
        return self.inner.fixed

    def start(self, ctx: DraftContext) -> DraftSession:
        request = (ctx.bonus, ctx.positions, ctx.max_new_tokens, ctx.vocabulary, ctx.sampling)
        session = RemoteSession(self.link)
        tell(
            self.link,
            Begin(session.request, self.inner, ctx.prompt, ctx.keep.cpu(), *request, ctx.generator.get_state(), ctx.seed),
        )
        return session


class RemoteSession(DraftSession):
    """Sends verdicts, and receives trees. The process drafts for one request at a time, the one that began last."""

    numbers = count()  # never repeat, so that the answer to an abandoned request is not taken for another

    def __init__(self, link: Connection) -> None:
        self.link, self.request = link, next(self.numbers)

    def propose(self, last: Verdict | None) -> DraftTree:
        """Receive the next tree. Raises UserError if the process has died, RuntimeError if it failed."""
        tell(self.link, Asked(self.request, number := next(self.numbers), last))
        try:
            while (found := heard(self.link)).number != number:
                pass
        except (EOFError, OSError):
            raise UserError("the draft's process died without a message; the run cannot go on") from None
        if found.tree is None:
            raise RuntimeError(f"the draft's process failed: {found.why}")
        self.drafted_ahead = found.ahead
        return found.tree


def tell(link: Connection, message: Any) -> None:
    """Send a message. If the other end is gone, does nothing: reading the answer will fail."""
    with suppress(OSError):
        link.send_bytes(pickle.dumps(message))


def heard(link: Connection) -> Any:
    """Wait for a message. Raises EOFError or OSError if the other end is gone."""
    return pickle.loads(link.recv_bytes())


@torch.inference_mode()
def serve(link: Connection, models: Models, engine: Engine) -> None:
    """Draft for one request at a time, until the other end of the link is gone. Errors are sent as an `Answer`."""
    caches, session, request, why = CachePool(), None, -1, ""
    lease = caches.lease(drafter=True)
    with suppress(EOFError, OSError):
        while True:
            asked = heard(link)
            answer = None if isinstance(asked, Begin) else Answer(asked.number, why=why)
            try:
                if isinstance(asked, Begin):
                    lease.release()
                    lease, session, request = caches.lease(drafter=True), None, asked.number
                    session = asked.drafter.start(_context(asked, models, lease, engine))
                elif asked.request != request:
                    answer = Answer(asked.number, why="another request has begun, and only one can run at a time")
                elif session is not None:
                    tree = engine.finish(session.propose(asked.last)).to(HOST)
                    answer = Answer(asked.number, tree, session.drafted_ahead)
            except Exception as error:
                session, why = None, f"{type(error).__name__}: {one_line(error)}"
                answer = answer and Answer(asked.number, why=why)
            if answer is not None:
                tell(link, answer)
            if session is not None and answer is not None and answer.tree is not None:
                try:
                    work: Any = session.guess_on(link.poll)
                    engine.finish(driven(work))
                except Exception as error:
                    session, why = None, f"{type(error).__name__}: {one_line(error)}"


def _context(asked: Begin, models: Models, lease: Any, engine: Engine) -> DraftContext:
    """Make the context of a request's session."""
    target, draft = models
    generator = generator_for(0)
    generator.set_state(asked.state)
    return DraftContext(
        prompt=asked.prompt,
        keep=asked.keep,
        bonus=asked.bonus,
        target=target,
        draft=draft,
        features_ND=None,
        positions=asked.positions,
        max_new_tokens=asked.max_new_tokens,
        vocabulary=asked.vocabulary,
        sampling=asked.sampling,
        generator=generator,
        caches=lease,
        captured=engine.captures,
        seed=asked.seed,
    )


def _served(link: Connection, other: Connection, load: Callable[[], Models], make: Callable[[], Engine]) -> None:
    """Load the models and serve; the process ends with this function."""
    other.close()  # a fork has a copy of it, and would never see that the other process is gone
    serve(link, load(), make())


@contextmanager
def draft_process(load: Callable[[], Models], make: Callable[[], Engine] = Engine, how: str = "spawn") -> Iterator[Connection]:
    """Start a process that drafts, and end it at the end of the block.

    Args:
        load: Loads the models in that process; for "spawn", a module-level function or a `partial` of one.
        make: Makes its engine.
        how: How Python starts the process: "spawn" or "fork".
    """
    context: Any = multiprocessing.get_context(how)
    mine, theirs = context.Pipe()
    process = context.Process(target=_served, args=(theirs, mine, load, make), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join(5)
        process.kill()
