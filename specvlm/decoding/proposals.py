"""The drafter's side of a request's rounds: propose a tree, and draft ahead while the target checks it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from specvlm.decoding.timing import Clock
from specvlm.engine import Engine
from specvlm.engine.base import Request, Submitted
from specvlm.errors import StrategyError
from specvlm.models.kv_cache import CacheLease
from specvlm.models.passes import Call, Jobs, Pass, guarded
from specvlm.strategies import Drafter, DraftSession
from specvlm.strategies.fence import check_pass, checked_item, defined_here, inside, is_ours, label_of
from specvlm.types import DraftTree, Verdict

MOST_PASSES = 4096  # maximum number of passes and routine calls of a drafter in one round, above the depth of any tree


@dataclass(frozen=True, eq=False)
class Proposals:
    """Runs a draft session.

    Attributes:
        drafter: The drafter. Errors name it.
        session: The drafter's session of this request.
        lease: The session's caches, the only ones that its passes may write to.
        engine: Engine that runs the passes.
        clock: Clock of the request.
        joins: Whether draft passes may run together with those of other requests (see `Call.joins`).
    """

    drafter: Drafter
    session: DraftSession
    lease: CacheLease
    engine: Engine
    clock: Clock
    joins: bool

    @cached_property
    def ours(self) -> bool:
        """Whether drafter and session are both specvlm's own. Our session may serve a plugin's drafter."""
        return is_ours(self.session) and is_ours(self.drafter)

    def tree(self, last: Verdict | None) -> Jobs[DraftTree]:
        """Return the session's next tree, yielding the passes that it takes. last: Verdict on the last tree, if any."""
        with inside(self.drafter):
            found = self.session.propose(last)
        return (yield from self._run(found)) if isinstance(found, Generator) else found

    @property
    def drafted_ahead(self) -> int | None:
        """Number of levels of the last tree that were drafted ahead; None if the session does not give an int."""
        with inside(self.drafter):
            levels = getattr(self.session, "drafted_ahead", None)
            return levels if type(levels) is int else None

    def check(self, request: Request, tree: DraftTree) -> Jobs[tuple[Verdict, list[int]]]:
        """Check a tree, as `Engine.check` does. Meanwhile the session may draft the next one."""
        started: list[Submitted] = []
        with inside(self.drafter):
            guess_on = getattr(self.session, "guess_on", None)
            found = guess_on(lambda: bool(started) and started[0].done) if guess_on is not None else None
        if not isinstance(found, Generator):
            return (yield from self.engine.check(request, tree))
        started.append((yield from self.engine.submit(request, tree)))
        yield from self._run(found)
        return (yield from self.engine.answer(started[0]))

    def _run(self, found: Generator[Any, Any, Any]) -> Jobs[Any]:
        """Run a generator of passes and calls of the session, and return its result."""
        ours, engine = self.ours, self.engine
        guard, check = partial(inside, label_of(self.drafter)), partial(check_pass, label_of(self.drafter))
        asked, result = guarded(found, guard(), partial(checked_item, self.drafter, self.lease)), None
        for _ in range(MOST_PASSES):
            try:
                item = asked.send(result)
            except StopIteration as end:
                return end.value
            if isinstance(item, Pass):
                result = yield item
            else:
                mine = ours and defined_here(item.routine.function)
                call = Call(item.routine, item.state, item.inputs, guard, check, mine, self.joins)
                result = yield from engine.call(call, self.clock.mark)
        raise StrategyError(f"{label_of(self.drafter)} asks for more than {MOST_PASSES} passes in a round")
