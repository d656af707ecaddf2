"""Lossless speculative decoding for video LLMs, built from interchangeable strategies.

    from specvlm import DecodingGraph, load, registry
    graph = DecodingGraph(load("…-32B"), load("…-7B"), registry.build("pruner", "two_stage"), …)
    for step in graph.decode(prompt, GenerationOptions(max_new_tokens=256)): …

Names are imported on first use. So the command line can answer before torch is loaded, and a plugin that imports only
base classes does not load transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specvlm.errors import UserError
    from specvlm.strategies import (
        Answer,
        Dataset,
        DraftContext,
        Drafter,
        DraftSession,
        Metric,
        PruneContext,
        Pruner,
        Sample,
        Sampling,
        Verifier,
        VerifyContext,
        gumbel,
    )
    from specvlm.strategies.plugins import hookimpl
    from specvlm.types import DraftTree, GenerationOptions, KeepSet, Step, TokenGrid, TreeShape, Verdict, VideoPrompt

_STRATEGY = ("Answer", "Dataset", "DraftContext", "Drafter", "DraftSession", "Metric", "PruneContext", "Pruner", "Sample")
_TYPES = ("DraftTree", "GenerationOptions", "KeepSet", "Step", "TokenGrid", "TreeShape", "Verdict", "VideoPrompt")
_LATER = {
    **dict.fromkeys((*_STRATEGY, "Sampling", "Verifier", "VerifyContext", "gumbel"), "specvlm.strategies"),
    **dict.fromkeys(_TYPES, "specvlm.types"),
    "UserError": "specvlm.errors",
    "hookimpl": "specvlm.strategies.plugins",
    "DecodingGraph": "specvlm.decoding.loop",
    "Scheduler": "specvlm.decoding.scheduler",
    "autoregressive": "specvlm.decoding.loop",
    "check_pair": "specvlm.models.load",
    "load": "specvlm.models.load",
    "compare": "specvlm.decoding.lossless",
    "read_video": "specvlm.video.video",
    "registry": "specvlm.strategies.registry",
}

__all__ = [
    "Answer", "Dataset", "DecodingGraph", "DraftContext", "DraftSession", "DraftTree", "Drafter", "GenerationOptions",
    "KeepSet", "Metric", "PruneContext", "Pruner", "Sample", "Sampling", "Scheduler", "Step", "TokenGrid", "TreeShape",
    "UserError", "Verdict", "Verifier", "VerifyContext", "VideoPrompt", "autoregressive", "check_pair", "compare",
    "gumbel", "hookimpl", "load", "read_video", "registry",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the module of a public name on its first use; Python calls this for names that the package lacks."""
    if name not in _LATER:
        raise AttributeError(f"module 'specvlm' has no attribute {name!r}")
    module = import_module(_LATER[name])
    return module if name == "registry" else getattr(module, name)
