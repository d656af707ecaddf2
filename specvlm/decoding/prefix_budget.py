"""How much memory may be taken by what is kept of prompts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from specvlm.decoding.prefixes import PrefixStore
from specvlm.errors import UserError, line
from specvlm.models.memory_plan import free_bytes

GIB = 2**30
SHARE = 0.25  # share of a device's free memory that is taken by default
MOST_ON_CPU = 4 * GIB  # but no more of a CPU's
MOST_GIB = 4096.0
HOST_SHARE = 0.125  # share of the host's free memory, for a GPU's less recently used rows
MOST_ON_HOST = 16 * GIB


def default_bytes(devices: Iterable[torch.device]) -> int:
    """Return the bytes that are kept on devices by default, given what is free now."""
    return sum(int(SHARE * min(free_bytes(d), MOST_ON_CPU / SHARE if d.type == "cpu" else 2**62)) for d in set(devices))


def host_bytes(devices: Iterable[torch.device]) -> int:
    """Return the bytes of host memory to which rows of these devices may move. None for rows of a CPU."""
    if all(device.type == "cpu" for device in devices):
        return 0
    return min(MOST_ON_HOST, int(HOST_SHARE * free_bytes(torch.device("cpu"))))


def check_prefixes(asked: object) -> None:
    """Raise UserError for what `store_for` does not take."""
    number = isinstance(asked, int | float) and not isinstance(asked, bool) and 0 <= asked <= MOST_GIB
    if not (number or asked is False or asked == "auto"):
        raise UserError(f"prefixes={line(repr(asked))}: expected auto, false, or the GiB to keep")


def store_for(devices: Iterable[torch.device], asked: str | bool | float = "auto") -> PrefixStore | None:
    """Make a store.

    Args:
        devices: Devices of the target's layers.
        asked: "auto"; False for no store; or GiB on the devices.
    """
    devices = list(devices)
    if asked is False:
        return None
    size = default_bytes(devices) if isinstance(asked, str) else int(GIB * asked)
    return PrefixStore(size, host_bytes(devices)) if size else None
