"""Memory of this machine that is free."""

from __future__ import annotations

from pathlib import Path


def free_bytes() -> int | None:
    """What the operating system would give without swapping; None where it does not say."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    line = next((line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None
