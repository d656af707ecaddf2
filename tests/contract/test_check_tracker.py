"""Every built-in tracker keeps the contract that plugins are held to, and the suite catches what breaks it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from specvlm.strategies import TrackedRun, Tracker, trackers
from specvlm.strategies.trackers.wandb import TrackerMode, WandbTracker
from specvlm.testing import check_tracker

INSTANCES = [WandbTracker(TrackerMode.offline), WandbTracker(TrackerMode.disabled)]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", INSTANCES, ids=repr)
def test_built_in_keeps_the_contract(tracker, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    check_tracker(tracker)


def test_every_built_in_is_checked():
    assert {type(tracker) for tracker in INSTANCES} == set(trackers.specvlm_strategies())


@dataclass(frozen=True)
class FaultyTracker(Tracker):
    name = "faulty"
    fault: str = ""

    def start(self, ctx):
        if self.fault == "changes the config":
            ctx.config["pruner"].clear()
        if self.fault == "a name as a file":
            (ctx.folder / ctx.name).mkdir()
        return "run" if self.fault == "a text" else FaultyRun(self.fault)

    def next_step(self, folder):
        if self.fault == "an empty folder":
            return next(folder.iterdir()).name
        return "two\nlines" if self.fault == "next_step" else ""


class FaultyRun(TrackedRun):
    def __init__(self, fault):
        self.fault, self.last = fault, -1

    def log(self, series, index, values):
        if self.fault == "wants an order" and series == "sample":
            assert index > self.last, "samples out of order"
            self.last = index
        if self.fault == "pops":
            values.popitem()
        if self.fault == "writes here":
            Path("log.txt").write_text("…")
        if self.fault == "draws":
            torch.rand(())
        if self.fault == "sets the environment":
            os.environ["PATH"] += ":/nowhere"

    def table(self, name, columns, rows):
        if self.fault == "encodes":
            [str(cell).encode() for row in rows for cell in row]
        if self.fault == "wants rows":
            rows[0]
        if self.fault == "sorts":
            rows.reverse()

    def summary(self, values):
        if self.fault == "adds":
            values["more"] = 1

    def finish(self, code):
        if self.fault == "wants success":
            assert code == 0, "the job failed"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("changes the config", "changes ctx.config"),
        ("a name as a file", "fails in start for"),
        ("a text", "start returned a str"),
        ("wants an order", "fails in log of sample 0: .*out of order"),
        ("pops", "log changes its values"),
        ("writes here", r"writes \['log.txt'\] into the working directory"),
        ("draws", "draws from torch's global generator"),
        ("sets the environment", r"changes the environment variables \['PATH'\]"),
        ("encodes", "fails in table 'samples' .*UnicodeEncodeError"),
        ("wants rows", "fails in table 'samples' of 0 rows"),
        ("sorts", "table changes its rows"),
        ("adds", "summary changes its values"),
        ("wants success", "fails in finish with code 5"),
        ("an empty folder", "fails in next_step"),
        ("next_step", "next_step must be one line"),
    ],
)
def test_the_suite_catches(fault, says, monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored afterwards
    with pytest.raises(AssertionError, match=says):
        check_tracker(FaultyTracker(fault=fault))


def test_a_tracker_without_a_fault_passes():
    check_tracker(FaultyTracker())
