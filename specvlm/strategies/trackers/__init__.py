"""Built-in trackers, one per file."""

from specvlm.strategies.plugins import hookimpl
from specvlm.strategies.trackers.wandb import WandbTracker


@hookimpl
def specvlm_strategies() -> list[type]:
    return [WandbTracker]
