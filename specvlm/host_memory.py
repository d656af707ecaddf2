"""Memory of this machine that is free."""

from __future__ import annotations

import psutil


def free_bytes() -> int:
    """What the operating system would give without swapping."""
    return int(psutil.virtual_memory().available)
