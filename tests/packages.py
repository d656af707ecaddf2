"""The packages under plugins/, importable without installation, for tests of everything that they bring."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from specvlm.strategies import Strategy, plugins

FOLDERS = sorted(path.parent for path in (Path(__file__).parent.parent / "plugins").glob("*/pyproject.toml"))


def module_of(folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # before one that is installed
    return importlib.import_module(folder.name.replace("-", "_"))


def strategies(kind: type[Strategy]) -> list[Strategy]:
    """Create one strategy of each class of a kind, with its defaults."""
    return [cls() for folder in FOLDERS for cls in plugins.strategies_of(module_of(folder)) if issubclass(cls, kind)]
