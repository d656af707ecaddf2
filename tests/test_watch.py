"""When one of two ranks ends, so does the other: at once, with one line from all of them."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import ending_worker
import forked
import pytest
from test_tensor import torchrun

from specvlm.errors import UserError
from specvlm.parallel.watchdog import Watch

pytestmark = pytest.mark.slow  # it starts processes
HERE = Path(__file__).parent


def said(how: str, folder: Path, ranks: int = 2) -> list[str]:
    """Return the lines printed by ranks of the torchrun command."""
    done = torchrun(HERE / "ending_worker.py", how, folder, ranks=ranks)
    assert done.returncode != 0
    return [line.removeprefix("specvlm: ") for line in done.stderr.splitlines() if line.startswith("specvlm:")]


def said_by_forks(how: str, folder: Path, ranks: int = 2) -> list[str]:
    """Return the lines printed by ranks of torchrun's agent as forks, which import nothing."""
    done = forked.under_agent(partial(ending_worker.run, how, folder), folder, ranks)
    assert done.codes == (1,) and "ChildFailedError" in done.err, done.err
    return [line.removeprefix("specvlm: ") for line in done.lines()]


KILLED = "rank 0 of {} died without a message: killed, out of the host's memory, or crashed; the run cannot go on"


def test_ranks_of_the_command_end_with_one_line(tmp_path):
    assert said("first_killed", tmp_path) == [KILLED.format(2)]


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        ("same_mistake", ["cuda:0 is not what it was"]),
        ("closed_pipe", []),
        (
            "memory_of_the_second",
            ["rank 1 of 2 ended: cuda:1 ran out of memory; 7 tokens are saved; the run cannot go on"],
        ),
        (
            "first_killed",
            [KILLED.format(2)],
        ),
        (
            "second_block",
            ["rank 1 of 2 died without a message: killed, out of the host's memory, or crashed; the run cannot go on"],
        ),
    ],
)
def test_ranks_end_with_one_line(how, lines, tmp_path):
    assert said_by_forks(how, tmp_path) == lines
    assert how != "second_block" or (tmp_path / "second").exists()


def test_of_three_ranks_the_lowest_left_says_it(tmp_path):
    assert said_by_forks("first_killed", tmp_path, 3) == [KILLED.format(3)]


def test_ranks_do_not_outlive_torchrun(tmp_path):
    assert said("torchrun_killed", tmp_path) == ["torchrun died; the run cannot go on"]
    pids, end = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)], monotonic() + 60
    while left := [pid for pid in pids if alive(pid)]:
        assert monotonic() < end, left
        sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_rank_saves_what_was_done_when_the_second_runs_out_of_memory(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    done = forked.ranks(partial(ending_worker.memory_of_a_run, tmp_path), tmp_path)
    assert all(done.codes), done.err
    (line,) = (line.removeprefix("specvlm: ") for line in done.lines())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["out_of_memory"] == "decoding without a drafter" and summary["verdict"] == "not checked"
    assert line.startswith("rank 1 of 2 ended: cpu ran out of memory while decoding without a drafter, though")
    assert f"; {summary['new_tokens']} tokens are in {tmp_path / 'run'}; the run cannot go on" in line
    assert not [path.name for path in (tmp_path / "temporary").iterdir() if path.name.startswith("specvlm")]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "summary.json"]


def test_without_pidfds_it_is_a_mistake_of_one_line(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    with pytest.raises(UserError, match="parallel=tensor needs Linux"):
        Watch(None, 0, 2)


def test_patience_is_over_when_what_it_was_for_fails():
    watch = Watch.__new__(Watch)
    with pytest.raises(KeyError), watch.patience("the ranks cannot part"):
        raise KeyError
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
