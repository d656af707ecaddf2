"""The stand-in for torchvision gives what torchvision gave, where prompts were frozen with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"
CODE = """
import json, sys
import make_families, stand_in
stand_in.install()
print("FOUND" + json.dumps({family: make_families.of_family(family) for family in sys.argv[1:]}))
"""
FAMILIES = ["qwen3_vl", "internvl", "qwen2_vl", "video_llama_3"]


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What processors make, in a process of their own, since transformers looks for torchvision when it is imported."""
    done = subprocess.run([sys.executable, "-c", CODE, *FAMILIES], cwd=DATA, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.rpartition("FOUND")[2])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_processors_give_what_they_gave_with_torchvision(family, made):
    found = made[family]
    assert found == json.loads((DATA / "families.json").read_text())[family] and len(found) >= 10
