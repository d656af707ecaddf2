"""The built-in data sets, one a file."""

from __future__ import annotations

from specvlm.datasets.synthetic import SyntheticDataset
from specvlm.plugins import hookimpl


@hookimpl
def specvlm_strategies() -> list[type]:
    return [SyntheticDataset]
