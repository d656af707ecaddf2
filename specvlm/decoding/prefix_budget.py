"""Memory limits for kept prompts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from specvlm.decoding.prefixes import PrefixStore
from specvlm.models.memory_plan import free_bytes

GIB = 2**30
SHARE = 0.25  # share of a device's free memory that kept prompts may take by default
MOST_ON_CPU = 4 * GIB  # upper bound on that share if the device is the CPU
HOST_SHARE = 0.125  # share of the host's free memory, for a GPU's less recently used rows
MOST_ON_HOST = 16 * GIB  # upper bound on that share


def share_of(device: torch.device, free: int) -> int:
    """Return the bytes of a device that kept prompts may take by default. free: Bytes that nothing else needs."""
    return int(SHARE * free) if device.type != "cpu" else min(MOST_ON_CPU, int(SHARE * free))


def host_bytes(devices: Iterable[torch.device]) -> int:
    """Return the bytes of host memory that rows moved from these devices may take. 0 if they are CPUs."""
    if all(device.type == "cpu" for device in devices):
        return 0
    return min(MOST_ON_HOST, int(HOST_SHARE * free_bytes(torch.device("cpu"))))


def asked_bytes(devices: Iterable[torch.device], asked: str | bool | float) -> int:
    """Return the bytes that kept prompts may take on devices. asked: as in `store_for`."""
    if isinstance(asked, str):
        return sum(share_of(device, free_bytes(device)) for device in set(devices))
    return int(GIB * asked)


def store_for(devices: Iterable[torch.device], asked: str | bool | float = "auto") -> PrefixStore | None:
    """Make a store of prompts.

    Args:
        devices: Devices of the target's layers.
        asked: GiB that the store may take on all devices together. "auto": a share of their free memory. False or 0: no
            store.

    Returns:
        The store; None if it would have no room.
    """
    devices = list(devices)
    size = asked_bytes(devices, asked)
    return PrefixStore(size, host_bytes(devices)) if size else None
