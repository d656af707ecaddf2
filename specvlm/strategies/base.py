"""What all kinds of strategy are."""

from typing import ClassVar


class Strategy:
    """Base of all kinds. `name` is the registered name and the file name; `kind` is the Hydra group.

    paper: what the strategy is named after, as "FastV (arXiv 2403.06764)"; empty where it is our own. fidelity: how close
    it is to the paper: "exact" does the paper's method on what a drafter reads, "adapted" differs where `Deviations:` of
    its docstring says, "inspired by" takes an idea. The list of options shows both.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
