"""Lossless speculative decoding for video LLMs, built from interchangeable strategies.

    import specvlm
    session = specvlm.load_pair("…-32B", "…-7B")
    print(session.generate("What happens?", videos="clip.mp4").text)

`DecodingGraph` is the loop itself, with models and strategies chosen one by one.

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
        TrackContext,
        TrackedRun,
        Tracker,
        Verifier,
        VerifyContext,
        gumbel,
    )
    from specvlm.strategies.plugins import hookimpl
    from specvlm.types import (
        DraftTree,
        GenerationOptions,
        KeepSet,
        Step,
        TokenGrid,
        TokenLogprobs,
        TreeShape,
        Verdict,
        VideoPrompt,
    )

_STRATEGY = (
    *("Answer", "Dataset", "DraftContext", "Drafter", "DraftSession", "Metric", "PruneContext", "Pruner", "Sample", "Sampling"),
    *("TrackContext", "TrackedRun", "Tracker", "Verifier", "VerifyContext", "gumbel"),
)
_TYPES = (
    "DraftTree",
    "GenerationOptions",
    "KeepSet",
    "Step",
    "TokenGrid",
    "TokenLogprobs",
    "TreeShape",
    "Verdict",
    "VideoPrompt",
)
_LATER = {
    **dict.fromkeys(_STRATEGY, "specvlm.strategies"),
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
    "load_pair": "specvlm.session.load",
    "Session": "specvlm.session.session",
    "TextStream": "specvlm.session.stream",
    "custom_generate": "specvlm.session.custom_generate",
    "GenerationResult": "specvlm.session.result",
    "Options": "specvlm.session.options",
    "clip_from_frames": "specvlm.video.memory",
    "Clip": "specvlm.video.video",
}

__all__ = [
    "Answer", "Clip", "Dataset", "DecodingGraph", "DraftContext", "DraftSession", "DraftTree", "Drafter",
    "GenerationOptions", "GenerationResult", "KeepSet", "Metric", "Options", "PruneContext", "Pruner", "Sample",
    "Sampling", "Scheduler", "Session", "Step", "TextStream", "TokenGrid", "TokenLogprobs", "TrackContext", "TrackedRun",
    "Tracker", "TreeShape", "UserError", "Verdict", "Verifier", "VerifyContext", "VideoPrompt", "autoregressive",
    "check_pair", "clip_from_frames", "compare", "custom_generate", "gumbel", "hookimpl", "load", "load_pair",
    "read_video", "registry",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the module of a public name on its first use; Python calls this for names that the package lacks."""
    if name not in _LATER:
        raise AttributeError(f"module 'specvlm' has no attribute {name!r}")
    module = import_module(_LATER[name])
    return module if name == "registry" else getattr(module, name)
