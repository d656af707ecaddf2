"""Devices of target and draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specvlm.errors import UserError

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM


@dataclass(frozen=True)
class Placement:
    """Devices of target and draft.

    Attributes:
        parallel: "layers", "tensor", or None for a single device.
        target: Devices of the target's layers in order; this rank's device if tensor-parallel.
        draft: Device of the draft; `first` unless draft.device names another.
        ranks: Number of tensor-parallel ranks; 1 without them.
        draft_shared: Whether the draft is tensor-parallel too; else rank 0 alone holds it.
    """

    parallel: str | None
    target: tuple[torch.device, ...]
    draft: torch.device
    ranks: int = 1
    draft_shared: bool = False

    @property
    def first(self) -> torch.device:
        """Device of the target's first layer."""
        return self.target[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Devices of target and draft in this process, each once."""
        return tuple(dict.fromkeys((*self.target, self.draft)))


def device_of(name: str | torch.device, key: str = "device", otherwise: str = "device=cpu or device=auto") -> torch.device:
    """Parse a device name and check that the device exists.

    Args:
        name: Name such as auto, cpu, cuda or cuda:1.
        key: The key that gave the name, for the error message.
        otherwise: Advice for the error message.

    Raises:
        UserError: The name is none of these, or there is no such GPU.
    """
    wanted = f"{key}={name}: expected auto, cpu, cuda or cuda:1"
    if not isinstance(name, str | torch.device):
        raise UserError(wanted)
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(wanted) from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(wanted)
    if (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{key}={name}: there are {count} CUDA devices here; use {otherwise}")
    return torch.device("cuda", device.index or 0)


def apart(draft: VideoLM, target: VideoLM) -> bool:
    """Whether the draft shares no device with the target, and its layers with no other rank."""
    shared = {stage.device for stage in draft.stages} & {stage.device for stage in target.stages}
    return draft.ranks.size == 1 and not shared
