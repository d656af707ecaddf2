"""The adviser: predict the gain of speculation on this machine. See `python -m specvlm.advise --help`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specvlm.advise.costs import Costs, predict, profile

__all__ = ["Costs", "predict", "profile"]


def __getattr__(name: str) -> Any:  # import lazily, so that the command can print before torch is imported
    if name not in __all__:
        raise AttributeError(f"module 'specvlm.advise' has no attribute {name!r}")
    return getattr(import_module("specvlm.advise.costs"), name)
