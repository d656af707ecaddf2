"""Check that strategies of plugins do not change what the requests of a session share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specvlm.decoding.scheduler import Decoding
from specvlm.errors import StrategyError, one_line
from specvlm.models.integrity import CODE, Snapshot, weights_of
from specvlm.models.kv_cache import CachePool
from specvlm.models.video_lm import VideoLM
from specvlm.strategies import Strategy
from specvlm.strategies.fence import is_ours, label_of


def compared(snapshot: Snapshot) -> tuple[list[str], list[str]]:
    """Return what `Snapshot.undo` does: names restored, names changed. If it fails, reports that instead of raising."""
    try:
        return snapshot.undo()
    except Exception as error:
        return [], [f"objects that cannot be read any more ({one_line(error)})"]


def blame(strategies: Sequence[Strategy], names: Sequence[str]) -> str:
    """Build the message for a change. names: What has changed; the message lists up to three.

    It names the strategies of plugins, or all strategies if none is a plugin's.
    """
    foreign = [one for one in strategies if not is_ours(one)]
    who = " or ".join(map(label_of, foreign or strategies))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{who} changed {', '.join(names[:3])}{more}, which other requests use too"


class Watch:
    """Compares models, caches, engine, code and settings before and after a plugin's strategy runs.

    A request fails if they changed while it ran, whether or not it is the one that the strategy belongs to. Code and
    settings are restored. If models, caches or the engine have changed, all later requests fail too.

    A comparison reads all weights, so it is made only if a plugin's strategy takes part in a request. Changes that a
    plugin's thread makes later are not found.
    """

    def __init__(self, models: Iterable[VideoLM], caches: CachePool, engine: object) -> None:
        self._models, self._caches, self._engine = list(models), caches, engine
        self._snapshot: Snapshot | None = None  # while any of `_running` runs
        self._running: list[Strategy] = []  # strategies of plugins
        self._faults: list[str] = []
        self._spoilt = False

    def over(self, work: Decoding, strategies: Sequence[Strategy]) -> Decoding:
        """Run a request, and compare at its end. Only the scheduler's turns may run it, so nothing else runs meanwhile.

        Raises StrategyError if something has changed, unless the request has raised an error itself.
        """
        if self._spoilt:
            raise StrategyError(f"{self._faults[-1]}: load the pair again")
        foreign, before = [one for one in strategies if not is_ours(one)], len(self._faults)
        self._begin(foreign)
        try:
            yield from work
        finally:
            self._end(foreign)
        if len(self._faults) > before:
            raise StrategyError(self._faults[-1])

    def _begin(self, foreign: Sequence[Strategy]) -> None:
        if foreign and self._snapshot is None:
            weights = [weights_of(model) for model in self._models]
            self._snapshot = Snapshot(CODE, self._models, weights, self._caches, self._engine)
        self._running += foreign

    def _end(self, foreign: Sequence[Strategy]) -> None:
        if self._snapshot is not None:
            undone, spoilt = compared(self._snapshot)
            if undone or spoilt:
                self._faults.append(blame(self._running, [*undone, *spoilt]))
                self._spoilt = bool(spoilt)
        for one in foreign:
            del self._running[next(place for place, other in enumerate(self._running) if other is one)]
        if not self._running:
            self._snapshot = None
