"""Mirror results to Weights & Biases (W&B). Its library, wandb, is imported only when a run starts."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL.Image import Image

from specvlm.errors import one_line
from specvlm.strategies.tracker import TrackContext, TrackedRun, Tracker

PATIENCE_S = 3.0  # wait for any answer of the server; with BEGIN_S this makes the 5 s that the docs promise
BEGIN_S, END_S = 2.0, 60.0  # limits on starting and on ending a W&B run, in seconds
SERIES = ("round", "sample")
PLOTTED = ("accepted_per_round", "speedup_decode", "speedup_end_to_end")
MOST = 200  # characters of a W&B error message that are shown
OFFLINE = "wandb_offline"  # key of `TrackContext.shared`, set once a run could not start online

TrackerMode = StrEnum("TrackerMode", "online offline disabled")


@dataclass(frozen=True)
class WandbTracker(Tracker):
    """Weights & Biases: a run for each job, grouped by sweep, and one with plots of the sweep.

    If the server does not answer within 5 s, or W&B cannot start the run, this run and all later ones of the command
    are written offline, below `wandb` in the results folder.

    Attributes:
        mode: `online`; `offline`: written into the results folder, for `wandb sync`; `disabled`: nothing is written.
        project: Name of the W&B project.
        entity: W&B user or team that owns the project; null: the default of the account.
    """

    name = "wandb"
    mode: TrackerMode = TrackerMode.online
    project: str = "specvlm"
    entity: str | None = None

    def start(self, ctx: TrackContext) -> TrackedRun | None:
        return None if self.mode == TrackerMode.disabled else WandbRun(self._begin(ctx), ctx.folder)

    def next_step(self, folder: Path) -> str:
        return f"wandb sync {folder / 'wandb'}/offline-run-*" if any(folder.glob("wandb/offline-run-*")) else ""

    def _begin(self, ctx: TrackContext) -> Any:
        """Start a W&B run and return it. Its name and group are final: W&B cannot rename offline runs."""
        import wandb

        named: dict[str, Any] = {"project": self.project, "entity": self.entity, "name": ctx.name, "group": ctx.group}
        named |= {"job_type": ctx.kind, "dir": str(ctx.folder), "config": dict(ctx.config), "tags": tags(ctx.config)}
        named |= {"reinit": "create_new", "settings": settings()}
        if self.mode == TrackerMode.online and OFFLINE not in ctx.shared:
            why = "" if reachable(wandb.Settings().base_url) else "its server cannot be reached"
            try:
                if not why:
                    return wandb.init(**named, mode="online")
            except Exception as error:
                why = one_line(error)[:MOST]
            ctx.shared[OFFLINE] = why
            ctx.note(f"W&B is written offline ({why})")
        return wandb.init(**named, mode="offline")


class WandbRun(TrackedRun):
    """A W&B run in progress. folder: the results folder; W&B keeps the run's files in its subfolder `wandb`."""

    def __init__(self, run: Any, folder: Path) -> None:
        self.run, self.folder = run, folder
        for series in SERIES:
            run.define_metric(f"{series}/*", step_metric=f"{series}/index")

    def log(self, series: str, index: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{series}/{key}": value for key, value in values.items()} | {f"{series}/index": index})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        data = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in rows]
        table = wandb.Table(columns=list(columns), data=data)
        with staging(self.folder):
            self.run.log({name: table} | (plots(table) if name == "jobs" else {}))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def finish(self, code: int) -> None:
        self.run.finish(exit_code=code)


def tags(config: Mapping[str, Any]) -> list[str]:
    """List the names of a job's strategies and its data set."""
    return sorted({str(config[part]["name"]) for part in ("pruner", "drafter", "verifier", "dataset") if config.get(part)})


def plots(table: Any) -> dict[str, Any]:
    """Make the charts of a sweep from its W&B table, which has one row per job."""
    import wandb

    made = {
        f"{key}_by_ratio": wandb.plot.line(table, "ratio", key, stroke="pruner", title=f"{key} by ratio") for key in PLOTTED
    }
    return made | {"speed": wandb.plot.scatter(table, *PLOTTED[:2], title=f"{PLOTTED[1]} by {PLOTTED[0]}")}


def reachable(address: str) -> bool:
    """Whether `address` answers within PATIENCE_S, through a proxy if one is set.

    Asks in a thread, since DNS look-ups have no timeout.
    """
    answered: list[bool] = []

    def ask() -> None:
        with suppress(OSError, ValueError):
            with suppress(urllib.error.HTTPError):  # an error page is an answer too
                urllib.request.urlopen(address, timeout=PATIENCE_S).close()
            answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return bool(answered)


@contextmanager
def staging(folder: Path) -> Iterator[None]:
    """During the block, have W&B stage pictures of tables in `folder`/wandb instead of in the user's home.

    Changes nothing if WANDB_DATA_DIR is set.
    """
    key = "WANDB_DATA_DIR"
    if key in os.environ:
        yield
        return
    os.environ[key] = str(folder / "wandb" / "data")
    try:
        yield
    finally:
        del os.environ[key]


def settings() -> Any:
    """Make W&B's settings: with time limits, and without output and work that disturbs timings (system statistics).

    Leaves out settings that the installed W&B does not know.
    """
    import wandb

    wishes: dict[str, Any] = {
        **{"console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True},
        **{"init_timeout": BEGIN_S, "login_timeout": BEGIN_S, "finish_timeout": END_S},
    }
    return wandb.Settings(**{key: value for key, value in wishes.items() if key in wandb.Settings.model_fields})
