"""What the tests of foreign input share: a folder of their own, words of a short run, and how a mistake is told."""

from __future__ import annotations

import pytest
import torch

FAST = ("frames=4", "max_new_tokens=3", "baseline=false")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def refused(action, capfd) -> str:
    """The one line on stderr with which a program ends."""
    assert action() == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("specvlm: ")
    return said
