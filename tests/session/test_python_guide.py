"""The Python of the guide runs as it stands and prints what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8"), re.S)


BLOCKS = blocks_of("python.md")
NAMES = {"specvlm", "session", "pair", "target"}


def calls() -> list[str]:
    """Calls of the guide to a session, to a model or to specvlm."""
    nodes = (node for block in BLOCKS for node in ast.walk(ast.parse(block)))
    made = (ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call))
    return [name for name in made if name.partition(".")[0] in NAMES]


def test_the_guide_has_forty_calls():
    assert len(calls()) >= 40
    assert {"load_pair", "generate", "stream", "generate_async", "stream_async", "custom_generate"} <= {
        name.rpartition(".")[2] for name in calls()
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", ["python.md", "prefixes.md"])
def test_the_guide_prints_what_it_says(page, capsys):
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for block in blocks_of(page):
        exec(compile(block, "python.md", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        for said in re.findall(r"^ *print\(.*\)  # (.*)$", block, re.M):
            assert said in printed, (said, printed)
