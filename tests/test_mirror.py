"""A tracker gets what the disk holds, and whatever goes wrong in it costs one line: no row, no answer, no exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from report_jobs import row
from sweeping import ASK, jobs, untimed
from test_plugins import Point, bringing

from specvlm.__main__ import main
from specvlm.results import mirror
from specvlm.results.mirror import Mirror, Tracking
from specvlm.results.rows import rows_of, steps_of, summary_of
from specvlm.strategies import TrackedRun, Tracker, plugins, registry

FEW = [*ASK, "dataset.scenes=2", "max_new_tokens=6"]
SEEN: list[tuple] = []  # calls of `SeenTracker`, with the name of the job
FAULTS = {
    "raises": lambda: 1 / 0,
    "a full disk": lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    "exits": lambda: sys.exit(3),
    "interrupts": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "its own error": lambda: (_ for _ in ()).throw(type("Odd", (BaseException,), {"__str__": lambda self: 1 / 0})()),
}


@dataclass(frozen=True)
class SeenTracker(Tracker):
    """Tracker that keeps what it gets, and fails where `at` says."""

    name = "seen"
    at: str = ""
    fault: str = "raises"

    def __post_init__(self):
        self.fail("made")

    def start(self, ctx):
        self.fail("start")
        SEEN.append(("start", ctx.name, ctx))
        return {"start nothing": None, "start a text": "run"}.get(self.at, SeenRun(self, ctx.name))

    def next_step(self, folder):
        self.fail("next_step")
        return f"look at\n{folder}"

    def fail(self, at):
        if self.at == at:
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            os.chdir("/")
            FAULTS[self.fault]()


class SeenRun(TrackedRun):
    def __init__(self, tracker, name):
        self.tracker, self.name = tracker, name

    def log(self, series, index, values):
        self.took("log", series, index, values)

    def table(self, name, columns, rows):
        self.took("table", name, columns, rows)

    def summary(self, values):
        self.took("summary", values)

    def finish(self, code):
        self.took("finish", code)

    def took(self, what, *args):
        self.tracker.fail(what)
        SEEN.append((what, self.name, *args))


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPECVLM_PLUGINS", raising=False)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point("specvlm-seen", bringing(SeenTracker), version="0.4")])
    registry.collect.cache_clear()
    SEEN.clear()
    yield
    registry.collect.cache_clear()


def mirrored(notes: list[str], **keys) -> Mirror:
    """Mirror a small job, from its start to its end."""
    one = Mirror(Tracking(registry.settings("tracker", {"name": "seen"} | keys), notes.append))
    one.begin("a job", "a sweep", Path.cwd(), {"ratio": 0.5})
    for index in (1, 0):
        one.sample(row(index) | {"sample": f"s{index}", "index": index}, [ROUND])
    one.finish({"ok": 2}, 0)
    return one


ROUND = {"round": 0, "tokens": [1, 2], "drafted": 5, "accepted": 1, "times_s": {"verify": 0.5}}
WHERE = ("made", "start", "log", "table", "summary", "finish", "next_step")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", WHERE)
def test_a_fault_is_one_line_that_names_the_package_and_changes_no_setting(at, fault):
    before, notes = (torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd(), threading.current_thread()), list[str]()
    one = mirrored(notes, at=at, fault=fault)
    assert at == "next_step" or one.tracking.next_step(Path("x")) == ("" if at == "made" else "look at x")
    assert at != "next_step" or one.tracking.next_step(Path("x")) == ""
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd(), threading.current_thread()) == before
    assert all(note.startswith("tracker=seen (specvlm-seen 0.4) ") for note in notes)
    assert all("\n" not in note and note.endswith("); results are not affected") for note in notes)
    assert ["is off for this job (" in note for note in notes] == {"made": [True, False], "next_step": [False]}.get(at, [True])
    assert one.run is None and not any(what == at for what, *_ in SEEN)


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_one_that_hangs_is_left_alone_for_good(at, monkeypatch):
    monkeypatch.setattr(mirror, "LIMIT_S", 0.2)
    held, notes = threading.Event(), list[str]()
    monkeypatch.setitem(FAULTS, "hangs", lambda: held.wait(20) and 1 / 0)  # once let go, it does nothing more
    one = mirrored(notes, at=at, fault="hangs")
    assert one.tracking.hangs and one.tracking.next_step(Path("x")) == ""
    (note,) = notes
    assert note.startswith("tracker=seen (specvlm-seen 0.4) is off from here on (Hangs: no answer within 0.2 s)")
    held.set()


def test_ctrl_c_during_a_call_is_the_users_and_nothing_is_called_after_it(monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    notes = list[str]()
    one = Mirror(Tracking(registry.settings("tracker", {"name": "seen"}), notes.append))
    one.begin("a job", "a sweep", Path.cwd(), {})
    monkeypatch.setattr(mirror, "failure_of", pressed)
    with pytest.raises(KeyboardInterrupt):
        one.finish({}, 0)
    monkeypatch.undo()
    one.finish({}, 0)
    assert [what for what, *_ in SEEN] == ["start"] and notes == []


def test_a_run_is_a_tracked_run_or_none():
    notes = list[str]()
    assert mirrored(notes, at="start nothing").run is None and notes == [] and len(SEEN) == 1
    mirrored(notes, at="start a text")
    assert "TypeError: start returned a str, expected a TrackedRun or None" in notes[0]


def test_it_gets_points_a_table_and_totals():
    notes = list[str]()
    mirrored(notes)
    calls = [call for what, _, *call in SEEN if what == "log"]
    assert [call[:2] for call in calls] == [["round", 0], ["sample", 1], ["round", 1], ["sample", 0]] and notes == []
    wanted = {"tokens": 2, "drafted": 5, "accepted": 1, "verify_s": 0.5, "number": 0, "of_sample": 1}
    assert calls[0][2] == wanted
    assert calls[1][2]["speedup_decode"] == 2.0
    assert all(isinstance(value, int | float) for call in calls for value in call[2].values())
    ((name, columns, rows),) = [call for what, _, *call in SEEN if what == "table"]
    assert name == "samples" and [found[0] for found in rows] == ["s0", "s1"]
    assert {len(found) for found in rows} == {len(columns)}
    assert [(what, *call) for what, _, *call in SEEN[-2:]] == [("summary", {"ok": 2}), ("finish", 0)]


@pytest.mark.slow
def test_a_sweep_mirrors_every_job_and_the_table_of_all(capsys):
    words = ["-m", *FEW, "pruner=uniform,random", "tracker=seen", "hydra.sweep.dir=sweep"]
    assert main(words) == 0
    contexts = [call[0] for what, _, *call in SEEN if what == "start"]
    assert [ctx.kind for ctx in contexts] == ["job", "job", "sweep"] and {ctx.group for ctx in contexts} == {"sweep"}
    assert contexts[0].shared is contexts[1].shared is contexts[2].shared
    assert contexts[0].config["pruner"] == {"name": "uniform"}
    for ctx in contexts[:2]:
        (job,) = (job for name, job in jobs(Path("sweep")).items() if f"pruner={ctx.config['pruner']['name']}" in name)
        lines = [line for found in rows_of(job) for line in steps_of(job)[found["sample"]]]
        points = [call for what, name, *call in SEEN if what == "log" and name == ctx.name]
        rounds = [values for series, _, values in points if series == "round"]
        assert [found["accepted"] for found in rounds] == [line["accepted"] for line in lines]
        (totals,) = [call[0] for what, name, *call in SEEN if what == "summary" and name == ctx.name]
        told = {key: value for key, value in summary_of(job).items() if value is not None}
        assert totals == {key: told[key] for key in totals} and told.keys() - totals.keys() == {"strategies", "versions"}
    (_, _, _, columns, rows) = next(call for call in SEEN if call[0] == "table" and call[2] == "jobs")
    assert len(rows) == 2 and {"job", "pruner", "ratio", "speedup_decode"} <= set(columns)
    assert f"look at {Path.cwd()}/sweep" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("at", ["made", "log", "finish"])
def test_rows_and_exit_code_are_those_of_a_run_without_it(at, capsys, tmp_path_factory):
    alone = tmp_path_factory.getbasetemp() / "alone"
    if not alone.exists():
        assert main([*FEW, f"hydra.run.dir={alone}"]) == 0
    capsys.readouterr()
    sweep = ["-m", "hydra.sweep.dir=sweep"] if at == "made" else ["hydra.run.dir=sweep"]  # alone, it would not begin
    assert main([*FEW, *sweep, "tracker=seen", f"tracker.at={at}", "tracker.fault='a full disk'"]) == 0
    (job,) = (path.parent for path in Path("sweep").rglob("samples.jsonl"))
    assert untimed(rows_of(job)) == untimed(rows_of(alone)) and summary_of(job)["status"] == "complete"
    told = capsys.readouterr().out.replace("\n", " ")
    assert told.count("tracker=seen (specvlm-seen 0.4)") == (2 if at == "made" else 1) and "No space left on device" in told


@pytest.mark.slow
def test_a_package_that_cannot_be_loaded_is_named(monkeypatch, caplog, capsys):
    broken = Point("specvlm-broken", ImportError("no module named x"), version="0.2")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [broken])
    registry.collect.cache_clear()
    assert main(["dataset=synthetic", "tracker=broken"]) == 2
    assert "specvlm: plugin specvlm-broken 0.2 is left out: ImportError: no module named x" in caplog.text
    assert 'tracker=broken: there is no tracker "broken"; choose from ' in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_it_never_imports_wandb(tmp_path):
    told = (
        "import sys; from specvlm.__main__ import main; code = main(sys.argv[1:]); print([int(code), 'wandb' in sys.modules])"
    )
    words = [*ASK, "dataset.scenes=1", "max_new_tokens=2", f"hydra.run.dir={tmp_path / 'out'}", "baseline=false"]
    ran = subprocess.run([sys.executable, "-c", told, *words], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert json.loads(ran.stdout.splitlines()[-1].lower()) == [0, False]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
