"""What torchrun tells its processes, by their environment. Needs no torch, so that a mistake is found before it is imported."""

import os
from pathlib import Path
from tempfile import gettempdir


def started() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_here() -> int:
    """Of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if started() else 0


def size_here() -> int:
    """Processes in all; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if started() else 1


def local_rank() -> int:
    """Which GPU of this machine is this process's own."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


def several_machines() -> bool:
    return started() and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]


def nowhere() -> Path | None:
    """Instead of a run's folder, on all ranks but the first, which alone writes: Hydra makes it, and nobody fills it."""
    return Path(gettempdir()) / f"specvlm-{os.getpid()}" if rank_here() else None
