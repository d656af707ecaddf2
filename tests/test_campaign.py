"""A sample of every campaign, so that a renaming cannot strand one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from campaign.__main__ import campaigns, main


def test_a_sample_of_every_campaign_finds_nothing():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # another process: campaigns fork, and this one has threads
    done = subprocess.run([sys.executable, "-m", "campaign", "--sample"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(campaigns())


@pytest.fixture
def finding(monkeypatch):
    """The campaign of bad keys, which has found something."""
    monkeypatch.setattr(campaigns()["bad_keys"], "run", lambda count, seed: [f"a fault among {count}"])


def test_a_finding_is_printed_and_ends_the_runner_with_1(finding, capsys):
    assert main(["bad_keys", "--count", "7"]) == 1
    assert capsys.readouterr().out.startswith("bad_keys: FOUND a fault among 7\nbad_keys: 7 attacks, 1 findings, 0 s, seed 0")


def test_a_campaign_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        main(["no_such"])
    assert "no campaign 'no_such'; there are bad_keys" in capsys.readouterr().err
