"""What all kinds of strategy are."""

from __future__ import annotations

from typing import ClassVar


class Strategy:
    """Base of all kinds. `name` is the registered name and the file name; `kind` is the Hydra group."""

    kind: ClassVar[str]
    name: ClassVar[str]
