"""The adviser: what speculation would bring on the machine at hand. `python -m specvlm.advise --help`."""

from specvlm.advise.costs import Costs, predict, profile

__all__ = ["Costs", "predict", "profile"]
