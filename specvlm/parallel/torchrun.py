"""Read the environment variables that torchrun sets. Needs no torch, so that mistakes are reported before it loads."""

import os
from pathlib import Path
from tempfile import gettempdir


def started() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_here() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if started() else 0


def size_here() -> int:
    """Return the number of ranks; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if started() else 1


def local_rank() -> int:
    """Return the index of this process's GPU on this machine; 0 without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


def several_machines() -> bool:
    """Whether the ranks are spread over several machines."""
    return started() and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]


def nowhere() -> Path | None:
    """Return a placeholder for the run's folder on ranks other than 0, which write no results. None on rank 0."""
    return Path(gettempdir()) / f"specvlm-{os.getpid()}" if rank_here() else None
