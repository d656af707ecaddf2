"""Mirror results to Weights & Biases: one W&B run per job, grouped by sweep. Files on disk are written first.

An error of W&B ends the mirror of that job, with a note; the job goes on.
"""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from specvlm.config import WandbConfig
from specvlm.errors import one_line
from specvlm.results.metrics import LATER

PATIENCE_S = 3.0  # wait for any answer of the server; with BEGIN_S this makes the 5 s that the docs promise
BEGIN_S, END_S = 2.0, 60.0  # limits on starting and on ending a W&B run, in seconds
# Keys of a round that are logged, each with a function that makes a number of its value.
ROUND: dict[str, Callable[[Any], int]] = {"tokens": len, "drafted": int, "accepted": int}
FIGURES = ("accepted_per_round", "kept_tokens", "video_tokens", "new_tokens", "rounds", "decode_s", "end_to_end_s",
           "baseline_decode_s", "baseline_end_to_end_s", "speedup_decode", "speedup_end_to_end", "tokens_per_second",
           "time_to_first_token_s", "drafter_start_s", "peak_memory_bytes", "order",
           *(key for key in LATER if not key.startswith("hf_")))  # fmt: skip
TEXTS = ("status", "verdict", "reason", "question", "answer", "text")
PLOTTED = ("accepted_per_round", "speedup_decode", "speedup_end_to_end")
MOST = 200  # characters of a W&B error message that are shown
CELL = 6  # pixels per video token in the picture


class Wandb:
    """Starts this process's W&B runs. Once one could not start online, all later ones are written offline.

    Args:
        wish: The checked keys of `tracker=wandb`.
        note: Shows a message to the user.
    """

    def __init__(self, wish: WandbConfig, note: Callable[[str], None]) -> None:
        self.wish, self.note, self.mode = wish, note, str(wish.mode)

    def begin(self, name: str, group: str, folder: Path, config: Mapping[str, Any], kind: str) -> Any:
        """Start a W&B run and return it. `name` and `group` are final: W&B cannot rename offline runs.

        Args:
            name: Name of the run.
            group: Name of the sweep.
            folder: Where W&B keeps its offline files.
            config: Plain configuration of the job.
            kind: W&B's job type, "job" or "sweep".
        """
        import wandb

        tags = {str(config[part]["name"]) for part in ("pruner", "drafter", "verifier", "dataset") if config.get(part)}
        named: dict[str, Any] = {"project": self.wish.project, "entity": self.wish.entity, "name": name, "group": group}
        named |= {"job_type": kind, "dir": str(folder), "config": dict(config), "tags": sorted(tags), "reinit": "create_new"}
        if self.mode == "online" and not reachable(wandb.Settings().base_url):
            self._offline("its server cannot be reached")
        if self.mode == "online":
            try:
                return wandb.init(**named, mode="online", settings=settings())
            except Exception as error:
                self._offline(one_line(error)[:MOST])
        return wandb.init(**named, mode="offline", settings=settings())

    def _offline(self, why: str) -> None:
        """Start all further runs offline, and say so."""
        self.mode = "offline"
        self.note(f"W&B is written offline ({why})")


class Tracker:
    """Mirror of one job. Does nothing before `begin`, after an error, without W&B, or with mode=disabled."""

    def __init__(self, wandb: Wandb | None) -> None:
        self.wandb = wandb if wandb and wandb.mode != "disabled" else None
        self.run: Any = None
        self.folder = Path()
        self.rows: dict[str, tuple[Mapping[str, Any], Any]] = {}

    def begin(self, name: str, group: str, folder: Path, config: Mapping[str, Any], kind: str = "job") -> None:
        """Start the W&B run of this job; for the arguments see `Wandb.begin`."""
        if self.wandb is None:
            return
        with self._safely():
            self.run, self.folder = self.wandb.begin(name, group, folder, config, kind), folder
            for series in ("round", "sample"):
                self.run.define_metric(f"{series}/*", step_metric=f"{series}/index")

    def sample(self, row: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> None:
        """Log a finished sample. row: its line of samples.jsonl; rounds: its lines of steps.jsonl."""
        if self.run is None:
            return
        with self._safely():
            done = sum(len(self.rows[sample][1]) for sample in self.rows)
            for place, line in enumerate(rounds, start=done):
                told = {f"round/{key}": made(line[key]) for key, made in ROUND.items()}
                told |= {f"round/{part}_s": seconds for part, seconds in line["times_s"].items()}
                self.run.log(told | {"round/index": place, "round/of_sample": row["index"], "round/number": line["round"]})
            figures = {f"sample/{key}": row[key] for key in FIGURES if row.get(key) is not None}
            scores = (row.get("scores") or {}).items()
            figures |= {f"sample/score_{metric}": score for metric, score in scores if score is not None}
            self.run.log(figures | {"sample/index": row["index"]})
            self.rows[row["sample"]] = (row, rounds)

    def finish(self, totals: Mapping[str, Any], code: int) -> None:
        """Log the table of samples and the totals, and end the run with an exit code."""
        if self.run is None:
            return
        with self._safely():
            import wandb

            columns: list[str | int] = ["sample", "kept", *TEXTS, *FIGURES]
            table = wandb.Table(columns=columns)
            for row, _ in sorted(self.rows.values(), key=lambda pair: pair[0]["index"]):
                picture = kept_picture(row)
                shown = None if picture is None else wandb.Image(picture)
                table.add_data(row["sample"], shown, *(row.get(key) for key in (*TEXTS, *FIGURES)))
            self._end({"samples": table}, {key: value for key, value in totals.items() if value is not None}, code)

    def plots(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Log a sweep: a table with one row of totals per job, and charts of it. Ends the run."""
        if self.run is None:
            return
        with self._safely():
            import wandb

            columns: list[str | int] = list(dict.fromkeys(key for job in jobs for key in job))
            table = wandb.Table(columns=columns, data=[[job.get(str(key)) for key in columns] for job in jobs])
            told: dict[str, Any] = {"jobs": table}
            for key in PLOTTED:
                told[f"{key}_by_ratio"] = wandb.plot.line(table, "ratio", key, stroke="pruner", title=f"{key} by ratio")
            told["speed"] = wandb.plot.scatter(table, *PLOTTED[:2], title=f"{PLOTTED[1]} by {PLOTTED[0]}")
            self._end(told)

    def _end(self, told: dict[str, Any], summary: Mapping[str, Any] | None = None, code: int = 0) -> None:
        """Log the last values and end the run. Waits at most END_S seconds for its end."""
        run, self.run = self.run, None
        with staging(self.folder):
            run.log(told)
        if summary:
            run.summary.update(summary)
        _in_time(lambda: run.finish(exit_code=code), END_S)

    @contextmanager
    def _safely(self) -> Iterator[None]:
        """Turn the mirror off, with a note, if the block raises an Exception."""
        try:
            yield
        except Exception as error:
            self.run = None
            assert self.wandb
            self.wandb.note(f"W&B is off for this job ({one_line(error)[:MOST]}); results are not affected")


def reachable(address: str) -> bool:
    """Whether `address` answers within PATIENCE_S, through a proxy if one is set.

    Asks in a thread, since DNS look-ups have no timeout.
    """

    def ask() -> None:
        with suppress(urllib.error.HTTPError):  # an error page is an answer too
            urllib.request.urlopen(address, timeout=PATIENCE_S).close()

    try:
        return _in_time(ask, PATIENCE_S)
    except (OSError, ValueError):
        return False


def _in_time(action: Callable[[], Any], seconds: float) -> bool:
    """Run `action` in a thread, abandoned when time is up. Returns whether it ended in time; raises what it raised."""
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


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
    """Make W&B's settings: quiet, without system statistics and the like that would disturb timings, and with limits.

    Leaves out settings that the installed W&B does not know.
    """
    import wandb

    wishes: dict[str, Any] = {
        **{"console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True},
        **{"init_timeout": BEGIN_S, "login_timeout": BEGIN_S, "finish_timeout": END_S},
    }
    return wandb.Settings(**{key: value for key, value in wishes.items() if key in wandb.Settings.model_fields})


def kept_picture(row: Mapping[str, Any]) -> Image.Image | None:
    """Draw all frames in a grid, one square per token, bright if the drafter saw it; None if no pruner was used.

    Tokens that belong to no frame are left out.
    """
    if row["kept"] is None or not row["grids"]:
        return None
    kept, parts, start = np.zeros(row["video_tokens"], np.uint8), [], 0
    kept[row["kept"]] = 1
    for frames, height, width, newline in row["grids"]:
        cells = kept[start : start + frames * height * width].reshape(frames, height, width)
        start += frames * height * width + newline
        across = int(np.ceil(frames**0.5))
        sheet = np.full((-(-frames // across) * (height + 1), across * (width + 1)), 128, np.uint8)
        for number, frame in enumerate(cells):
            top, left = number // across * (height + 1), number % across * (width + 1)
            sheet[top : top + height, left : left + width] = 24 + 231 * frame
        parts.append(sheet)
    wide = max(part.shape[1] for part in parts)
    whole = np.concatenate([np.pad(part, ((0, 1), (0, wide - part.shape[1])), constant_values=128) for part in parts])
    return Image.fromarray(whole).resize((whole.shape[1] * CELL, whole.shape[0] * CELL), Image.Resampling.NEAREST)


def sync_line(folder: Path) -> str:
    """Return the command that uploads the offline W&B runs in `folder`; empty if there are none."""
    return f"wandb sync {folder / 'wandb'}/offline-run-*" if any(folder.glob("wandb/offline-run-*")) else ""
