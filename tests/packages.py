"""The packages under plugins/, importable without installation, for tests of everything that they bring."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from specvlm.models import families
from specvlm.strategies import Strategy, plugins

PACKAGES = sorted(path.parent for path in (Path(__file__).parent.parent / "plugins").glob("*/pyproject.toml"))


def project(folder: Path) -> dict[str, Any]:
    """Return the table `project` of a package's pyproject.toml."""
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


FOLDERS = [folder for folder in PACKAGES if "specvlm" in project(folder)["entry-points"]]  # the plugins among them


def module_of(folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # before one that is installed
    return importlib.import_module(folder.name.replace("-", "_"))


def strategies(kind: type[Strategy]) -> list[Strategy]:
    """Create one strategy of each class of a kind, with its defaults."""
    return [cls() for folder in FOLDERS for cls in plugins.strategies_of(module_of(folder)) if issubclass(cls, kind)]


@contextmanager
def installed(*names: str) -> Iterator[None]:
    """Pretend that these packages, and no others, are installed, for the model families that they bring."""
    points = []
    for name in names:
        folder = next(folder for folder in FOLDERS if folder.name == name)
        module = module_of(folder)
        dist = SimpleNamespace(name=name, version=project(folder)["version"])
        points.append(SimpleNamespace(name=name, load=lambda module=module: module, dist=dist))
    families.sources.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("SPECVLM_PLUGINS", raising=False)
        patched.setattr(plugins, "entry_points", lambda group: points)
        yield
    families.sources.cache_clear()
