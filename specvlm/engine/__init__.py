"""Engines, which run the steps of the decoding loop: `eager` on any device, `graphs` on recent NVIDIA GPUs.

The eager engine runs Hugging Face's modules. The other one replays CUDA graphs, and needs compute capability 8.0;
"auto" chooses it from 9.0 on. An engine outlives requests and may serve several at once. It holds no state of a
request, only shared objects such as captured graphs, keyed by shape and cache.
"""

import torch

from specvlm.engine.base import Engine
from specvlm.engine.program import untested, why_not_captured
from specvlm.errors import UserError

__all__ = ["ENGINES", "Engine", "Fallback", "captures_on", "engine_for"]

ENGINES = ("auto", "eager", "graphs")


def engine_for(name: str, device: torch.device | str = "cpu") -> Engine:
    """Create an engine.

    Args:
        name: "auto", "eager" or "graphs". auto: graphs if it can run on the device and was tested there, else eager.
        device: Device of the models that the engine will run.

    Returns:
        The engine. If "graphs" is asked for but cannot run, an eager one, whose `note` says why.

    Raises:
        UserError: `name` is none of these.
    """
    if name not in ENGINES:
        raise UserError(f"engine={name} is none of {', '.join(ENGINES)}")
    if name == "eager":
        return Engine()
    device = torch.device(device)
    why = why_not_captured(device)
    if why is None and device.index not in (None, torch.cuda.current_device()):
        why = f"{device} is not the current CUDA device: call torch.cuda.set_device, or set CUDA_VISIBLE_DEVICES"
    if why is not None:
        return Fallback(why) if name == "graphs" else Engine()
    note = untested(device)
    if note and name == "auto":
        return Engine()
    from specvlm.engine.cuda_graphs import GraphsEngine

    engine = GraphsEngine()
    engine.note = note
    return engine


def captures_on(name: str, device: torch.device) -> bool:
    """Whether the engine of this name captures steps on a device, provided that it is the current CUDA device."""
    return name != "eager" and why_not_captured(device) is None and not (name == "auto" and untested(device))


class Fallback(Engine):
    """Eager engine in place of a requested one that cannot run here."""

    def __init__(self, why: str) -> None:
        self.note = f"engine=graphs cannot run here ({why}): running eager"
