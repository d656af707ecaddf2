"""The stand-in for torchvision gives what torchvision gave, where prompts were frozen with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
CODE = """
import json, sys
import make_families, stand_in
stand_in.install()
found = make_families.of_family(sys.argv[1])
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "qwen2_vl", "video_llama_3"])
def test_processors_give_what_they_gave_with_torchvision(family):
    """In a process of its own, since transformers looks for torchvision when it is imported."""
    done = subprocess.run([sys.executable, "-c", CODE, family], cwd=DATA, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert found == json.loads((DATA / "families.json").read_text())[family] and len(found) >= 10
