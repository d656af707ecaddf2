"""Base classes of the six kinds of strategy, with the contexts they are called with. One file per kind.

A plugin needs only this package and `specvlm.types`; a drafter that runs a model also needs `specvlm.models.passes`.

A strategy is a frozen dataclass of plain values. Its fields are its Hydra config, its repr is its log line. State
that changes during a request lives in the draft session and the caches, which each request gets for itself.
"""

from specvlm.strategies.base import Strategy
from specvlm.strategies.dataset import Dataset, Sample
from specvlm.strategies.drafter import DraftContext, Drafter, DraftPrefill, DraftSession
from specvlm.strategies.metric import Answer, Metric
from specvlm.strategies.noise import gumbel
from specvlm.strategies.pruner import PruneContext, Pruner
from specvlm.strategies.signals import CODEC_SIGNALS, SIGNALS, STATE_SIGNALS, VIDEO_SIGNALS, token_signals
from specvlm.strategies.tracker import TrackContext, TrackedRun, Tracker
from specvlm.strategies.verifier import Sampling, Verifier, VerifyContext, uniform

__all__ = [
    "CODEC_SIGNALS", "SIGNALS", "STATE_SIGNALS", "VIDEO_SIGNALS", "Answer", "Dataset", "DraftContext", "DraftPrefill",
    "DraftSession", "Drafter", "Metric", "PruneContext", "Pruner", "Sample", "Sampling", "Strategy", "TrackContext",
    "TrackedRun", "Tracker", "Verifier", "VerifyContext", "gumbel", "token_signals", "uniform",
]  # fmt: skip
