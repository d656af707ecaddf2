"""The package's layers, and the import paths of the previous release, which work for one more."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from specvlm.strategies.drafters.tree import TreeDrafter

ROOT = Path(__file__).parents[1]
OLD = {
    "plugins": ("strategies.plugins", "hookimpl"),
    "strategy": ("strategies", "Pruner"),
    "signals": ("decoding.collect", "gathered"),
    "segments": ("toolkit.segments", "cuts"),
    "cluster": ("toolkit.cluster", "cluster"),
    "passes": ("models.passes", "Pass"),
}


def test_each_layer_imports_from_those_below_it_and_nothing_runs_in_a_circle():
    """In a process of its own: import-linter sets up logging, and then later tests see no warning of ours."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_is_excused():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_few_files_lie_directly_under_the_package():
    assert len(list((ROOT / "specvlm").glob("*.py"))) <= 10


@pytest.mark.parametrize("old", OLD)
def test_an_old_path_works_and_says_where_to_look(old):
    new, name = OLD[old]
    sys.modules.pop(f"specvlm.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"import from specvlm.{new}$"):
        module = import_module(f"specvlm.{old}")
    assert getattr(module, name) is getattr(import_module(f"specvlm.{new}"), name)


def test_nothing_here_takes_an_old_path():
    words = rf"(from|import) specvlm\.({'|'.join(OLD)})\b"
    found = subprocess.run(["git", "grep", "-nE", words, "--", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True)
    assert not found.stdout


def test_a_drafters_old_word_for_its_budget_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"^Old.sees is called own_budget now$"):
        old = type("Old", (TreeDrafter,), {"sees": lambda self, prompt: 7})
    assert old().own_budget(None) == 7


@pytest.mark.slow
def test_experiments_and_examples_import_names_that_exist():
    """They are no part of the typed package, so nothing else would say so before they run."""
    files = [path for folder in ("experiments", "examples", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "specvlm":
                for name in node.names:
                    module = import_module(str(node.module))
                    assert hasattr(module, name.name) or import_module(f"{node.module}.{name.name}"), path
