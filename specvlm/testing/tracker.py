"""Contract checks for trackers, on made-up jobs. Needs no model, and no network unless the tracker does."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from specvlm.strategies import TrackContext, TrackedRun, Tracker
from specvlm.testing.contract import made, other_global_state

NAMES = ("pruner=uniform ratio=0.5", "a/b\\c: 'd' \"e\" *?<>| %s {x}", "青い 🙂 " + "long " * 60)
CONFIG = {"pruner": {"name": "uniform"}, "tracker": None, "ratio": 0.5, "video": ["a.mp4", "b c.mp4"], "check": None}
TEXTS = ("It's red.", "", "| two\nlines |", "<b>&amp;</b> _*`$\\", "青い", "\x00", "\ud800", "word " * 4000)
NUMBERS = (0, 1.5, -2, 1e300, 2**60, 1e-320)
TOTALS = {"status": "complete", "ok": 8, "decode_s": 1.5, "verdicts": {"identical": 8}, "scores": {}, "empty": []}
COLUMNS = ("sample", "kept", "text", "decode_s")


def check_tracker(tracker: type[Tracker] | Tracker, **fields: Any) -> None:
    """Check that a tracker keeps the contract of `Tracker.start` and `TrackedRun`.

    Cases: three jobs of a sweep, open at the same time, and the run of the sweep; names and texts of any content, even
    ones that are not valid Unicode; numbers of any size; samples out of order; tables with pictures, empty cells and
    without rows; jobs that fail; a second run of a job, as after `resume=true`. All in a temporary folder.

    Checks: nothing is raised; `start` returns a `TrackedRun` or None; arguments are not changed; nothing is written
    into the working directory; torch's global generator and environment variables that are set stay as they are;
    `next_step` is one line.

    Args:
        tracker: A class or an instance. The class must work without arguments.
        **fields: Values of the tracker's fields, such as one that needs no server.

    Raises:
        AssertionError: The tracker breaks the contract.
    """
    tracker = made(tracker, Tracker, fields)  # type: ignore[type-abstract]
    with TemporaryDirectory() as results, TemporaryDirectory() as elsewhere, chdir(elsewhere), _same_environment(tracker):
        with other_global_state(repr(tracker)):
            _sweep(tracker, Path(results))
        left = sorted(os.listdir(elsewhere))
        assert not left, f"{tracker!r} writes {left} into the working directory: write into ctx.folder"
        for folder in (Path(results), Path(results, "missing")):
            step = _done(tracker, "next_step", lambda folder=folder: tracker.next_step(folder))  # type: ignore[misc]
            assert isinstance(step, str) and "\n" not in step, f"{tracker!r}: next_step must be one line, got {step!r}"


def _sweep(tracker: Tracker, folder: Path) -> None:
    """Mirror a sweep whose jobs take turns, then one job again."""
    ctx = TrackContext("", "sweep of today", folder, CONFIG)
    runs = [_started(tracker, replace(ctx, name=name)) for name in NAMES]
    for index in (1, 0, 3):
        for run in runs:
            _sample(tracker, run, index)
    for code, run in zip((0, 5, 1), runs, strict=True):
        _ended(tracker, run, "samples", [COLUMNS, *_rows()], code)
    again = _started(tracker, replace(ctx, name=NAMES[0]))
    _sample(tracker, again, 0)
    _ended(tracker, again, "samples", [COLUMNS], 0)
    points = [("job", "pruner", "ratio", "speedup_decode"), ("one", "uniform", 0.5, 1.5), ("two", "uniform", 0.9, None)]
    above = replace(ctx, name="sweep of today: all jobs", kind="sweep", config={"jobs": list(NAMES)})
    _ended(tracker, _started(tracker, above), "jobs", points, 0)


def _started(tracker: Tracker, ctx: TrackContext) -> TrackedRun | None:
    """Start a run."""
    config = copy.deepcopy(dict(ctx.config))
    run = _done(tracker, f"start for {ctx.name[:40]!r}", lambda: tracker.start(ctx))
    assert run is None or isinstance(run, TrackedRun), f"{tracker!r}: start returned a {type(run).__name__}"
    assert ctx.config == config, f"{tracker!r}: start changes ctx.config"
    return run


def _sample(tracker: Tracker, run: TrackedRun | None, index: int) -> None:
    """Log two rounds and the sample that they belong to. Names of values differ between samples."""
    if run is None:
        return
    points = [("round", 2 * index + number, {"accepted": number, "verify_s": 0.01}) for number in range(2)]
    for series, place, values in [*points, ("sample", index, {f"figure_{index}": NUMBERS[index], "decode_s": 1.5})]:
        before = dict(values)
        _done(tracker, f"log of {series} {place}", lambda s=series, p=place, v=values: run.log(s, p, v))  # type: ignore[misc]
        assert values == before, f"{tracker!r}: log changes its values"


def _ended(tracker: Tracker, run: TrackedRun | None, name: str, lines: Sequence[Sequence[Any]], code: int) -> None:
    """Log a table and the totals, and end the run. lines: the columns, then the rows."""
    if run is None:
        return
    columns, rows, totals = list(lines[0]), [list(row) for row in lines[1:]], copy.deepcopy(TOTALS)
    before = [list(row) for row in rows]
    _done(tracker, f"table {name!r} of {len(rows)} rows", lambda: run.table(name, columns, rows))
    assert (columns, rows) == (list(lines[0]), before), f"{tracker!r}: table changes its rows"
    _done(tracker, "summary", lambda: run.summary(totals))
    assert totals == TOTALS, f"{tracker!r}: summary changes its values"
    _done(tracker, f"finish with code {code}", lambda: run.finish(code))


def _rows() -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table of samples."""
    for number, text in enumerate(TEXTS):
        picture = None if number % 2 else Image.new("L", (8 + number, 6), 128)
        yield f"sample {number}", picture, text, None if number == 1 else NUMBERS[number % len(NUMBERS)]


def _done(tracker: Tracker, what: str, action: Callable[[], Any]) -> Any:
    """Call `action`. If it raises, raise an AssertionError that says `what` failed."""
    try:
        return action()
    except Exception as error:
        raise AssertionError(f"{tracker!r} fails in {what}: {type(error).__name__}: {error}") from error


@contextmanager
def _same_environment(tracker: Tracker) -> Iterator[None]:
    """Check that the block changes no environment variable that is already set. It may set new ones."""
    before = dict(os.environ)
    yield
    changed = sorted(key for key, value in before.items() if os.environ.get(key) != value)
    assert not changed, f"{tracker!r} changes the environment variables {changed}"
