"""Helpers for tests of foreign input: a folder, the words of a short run, and the error line of a refusal."""

from __future__ import annotations

import pytest
import torch

FAST = ("frames=4", "max_new_tokens=3", "baseline=false")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def refused(action, capfd) -> str:
    """Return the one line on stderr with which a program ends."""
    assert action() == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("specvlm: ")
    return said
