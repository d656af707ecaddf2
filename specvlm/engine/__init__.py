"""How a step of the decoding loop runs: `eager` anywhere, through Hugging Face's modules; `graphs` on a GPU.

An engine is kept across requests, and several requests at once may use it. It holds no request's state: only what it
captured, by shape and cache.
"""

import torch

from specvlm.engine.base import Engine
from specvlm.engine.program import why_not_captured
from specvlm.errors import UserError

__all__ = ["ENGINES", "Engine", "Fallback", "engine_for"]

ENGINES = ("auto", "eager", "graphs")


def engine_for(name: str, device: torch.device | str = "cpu") -> Engine:
    """The engine called `name` for that device. auto: graphs where it can be had. Raises UserError for another name.

    graphs where it cannot be had gives the eager one, whose `note` says so.
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
    from specvlm.engine.cuda_graphs import GraphsEngine

    return GraphsEngine()


class Fallback(Engine):
    """Eager, because what was asked for cannot be had."""

    def __init__(self, why: str) -> None:
        self.note = f"engine=graphs cannot run here ({why}): running eager"
