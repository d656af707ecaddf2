"""What goes wrong in a call stays with it: plugins that change shared state, cancelled calls, memory that does not suffice."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from session_pairs import CHAIN, COUPLED, QUESTION, clip, leased, new_session, session

from specvlm import KeepSet, Pruner, Session, UserError, load_pair
from specvlm.errors import OutOfMemory, StrategyError
from specvlm.models.video_lm import VideoLM
from specvlm.session import room
from specvlm.strategies.verifiers.greedy import GreedyVerifier

pytestmark = pytest.mark.slow
SHORT = {"max_new_tokens": 4}


def ask(of: Any, **options: Any) -> Any:
    return of.generate(QUESTION, videos=clip(frames=4), **({"drafter": CHAIN} | SHORT | options))


@dataclass(frozen=True)
class Meddler(Pruner):
    """A pruner of a plugin that calls a function before it selects."""

    name = "meddler"
    meddle: Any = field(default=lambda: None)

    def select(self, ctx):
        self.meddle()
        return KeepSet.uniform(ctx.total, ctx.budget)


def beside() -> Session:
    """Another session of the same models."""
    return load_pair(session().target, session().draft)


def scale_weights(of: Any) -> None:
    with torch.inference_mode(False), torch.no_grad():
        of.target.hf.lm_head.weight.mul_(1.5)


def drop_penalty(of: Any) -> None:
    of.target.repetition_penalty += 1.0


def patch_rule(of: Any) -> None:
    GreedyVerifier.first = lambda self, logits_V, generator: 7


def set_precision(of: Any) -> None:
    torch.set_float32_matmul_precision("medium" if torch.get_float32_matmul_precision() == "highest" else "highest")


@pytest.mark.parametrize(
    ("meddle", "named", "spoilt"),
    [
        (scale_weights, "weights of", True),
        (drop_penalty, "repetition_penalty", True),
        (patch_rule, "GreedyVerifier.first", False),
        (set_precision, "float32 precision", False),
    ],
)
def test_a_plugin_that_changes_what_requests_share_ends_its_call(meddle, named, spoilt):
    of = new_session() if meddle is scale_weights else beside()
    want = ask(of).token_ids
    assert ask(of, pruner=Meddler()).token_ids == want
    with pytest.raises(StrategyError, match=f"pruner=meddler changed .*{named}"):
        ask(of, pruner=Meddler(lambda: meddle(of)))
    if spoilt:
        with pytest.raises(StrategyError, match="load the pair again"):
            ask(of)
    else:
        assert ask(of).token_ids == want
    if meddle is drop_penalty:
        of.target.repetition_penalty -= 1.0
    assert leased(of) == []


def test_a_call_beside_a_plugins_is_told_of_what_it_changed():
    of, begun = beside(), threading.Event()

    def meddle() -> None:
        begun.set()
        patch_rule(of)

    with ThreadPoolExecutor(2) as pool:
        stream = of.stream(QUESTION, videos=clip(frames=4), max_new_tokens=40)
        assert next(stream)  # it has begun
        bad = pool.submit(ask, of, pruner=Meddler(meddle))
        with pytest.raises(StrategyError, match="pruner=meddler changed"):
            list(stream)
        with pytest.raises(StrategyError, match="pruner=meddler changed"):
            bad.result()
    assert stream.result is None and leased(of) == [] and ask(of).verdict == "not checked"


def test_a_plugin_that_asks_its_own_session_is_refused_and_not_waited_for():
    of = session()
    with pytest.raises(UserError, match="cannot wait for another one of the same session"):
        ask(of, pruner=Meddler(lambda: ask(of)))
    assert leased(of) == []


# ---- cancelled calls -----------------------------------------------------------------------------------------------


class At:
    """Lets a session's scheduler reach a number of steps, and holds the next one up until it is told to go on."""

    def __init__(self, of: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.on, self.left, self._step = threading.Event(), threading.Event(), 0, of.scheduler.step
        monkeypatch.setattr(of.scheduler, "step", self.step)

    def step(self, ticket):
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            self.on.wait(60)
        return self._step(ticket)


@pytest.mark.parametrize(
    ("options", "places"),
    [({}, (1, 3)), ({"n": 3, "verifier": COUPLED}, (1, 7)), ({"check": True}, (2, 14))],
    ids=["one", "several", "checked"],
)
def test_a_call_that_is_cancelled_runs_no_more_whenever_it_is(options, places, monkeypatch):
    """Before its first step, and while the target answers alone, too."""
    of = beside()
    at, seen = At(of, monkeypatch), list[int]()

    async def cancelled() -> None:
        task = asyncio.create_task(of.generate_async(QUESTION, videos=clip(frames=4), max_new_tokens=12, **options))
        await asyncio.get_running_loop().run_in_executor(None, at.reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen.append(of.scheduler.asked)
        at.on.set()

    for at.left in places:
        at.reached.clear(), at.on.clear()
        asyncio.run(cancelled())
        of._threads.submit(lambda: None).result()
        assert leased(of) == [] and of.scheduler.asked == seen[-1]
    of._threads.shutdown()
    assert of.scheduler.asked == seen[-1]


def test_a_call_is_cancelled_before_its_requests_are_submitted():
    from specvlm.session.call import Calls, Cancelled

    calls = Calls()
    calls.cancel()
    with pytest.raises(Cancelled):
        calls.add(lambda: pytest.fail("submitted"))


def test_answers_that_share_a_prefill_all_tell_of_its_error(monkeypatch):
    of, calls = beside(), []

    def broken(self, *args):
        calls.append(self)
        raise ValueError("no prefill today")

    with monkeypatch.context() as patched:
        patched.setattr(VideoLM, "prefill", broken)
        with pytest.raises(ValueError, match="no prefill today"):
            ask(of, n=3, verifier=COUPLED)
    assert leased(of) == [] and len(ask(of, n=2, verifier=COUPLED)) == 2


# ---- memory --------------------------------------------------------------------------------------------------------


def test_models_and_requests_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    of = beside()  # it has no caches yet
    with pytest.raises(UserError, match=r"the answer needs about .* GiB on cpu.* ask for fewer"):
        ask(of, max_new_tokens=10**10)
    with pytest.raises(UserError, match="1000000000 answers need about"):
        ask(of, n=10**9)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2**20)
    for given in ("embedded:qwen2_5_vl", "embedded:llava_onevision"):
        with pytest.raises(UserError, match="the models need about"):
            load_pair(given, device="cpu")
    monkeypatch.setattr("specvlm.session.session.check_answers", lambda *_: None)
    with pytest.raises(UserError, match="the request needs about .* ask for fewer frames"):
        ask(of)
    assert leased(of) == []


def test_memory_that_runs_out_is_told_in_one_line_and_the_session_goes_on(monkeypatch):
    of = session()

    def full(self, passes):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(type(of.engine), "run", full)
        with pytest.raises(OutOfMemory) as told:
            ask(of)
    assert "memory ran out" in str(told.value) and "\n" not in str(told.value)
    assert len(ask(of).token_ids) == 4 and leased(of) == []


def test_calls_wait_for_room_and_one_that_never_fits_is_refused():
    """Two calls at once where only one has room: both answer as alone."""
    of = beside()
    right = ask(of).text
    scheduler, size = of.scheduler._scheduler, of.caches.nbytes  # of one request: the pool keeps its caches
    scheduler.room = int(1.5 * size)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: ask(of).text, range(2)))
    assert found == [right] * 2 and of.caches.nbytes == size  # never two at once, so no caches for a second
    scheduler.room = size // 2
    with pytest.raises(UserError, match="lower max_new_tokens"):
        ask(of)
    assert leased(of) == []
