"""The base class of all strategies."""

from typing import ClassVar


class Strategy:
    """Base class of pruners, drafters, verifiers, data sets, metrics and trackers.

    Attributes:
        kind: The Hydra group: "pruner", "drafter", "verifier", "dataset", "metric" or "tracker". Set by each base
            class.
        name: The registered name, an identifier. For built-in strategies, also the name of the file.
        paper: The source, such as "FastV (arXiv 2403.06764)". Empty if the strategy is our own.
        fidelity: How close the strategy is to its paper. "exact": the same method, used for a drafter. "adapted":
            differs as listed under `Deviations:` in the docstring. "inspired by": borrows an idea. `--help` shows it
            together with `paper`.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
