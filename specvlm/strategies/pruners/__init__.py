"""Built-in pruners, one per file, registered through the same hook as plugins."""

from specvlm.strategies import Strategy
from specvlm.strategies.plugins import hookimpl
from specvlm.strategies.pruners.fastv import FastVPruner
from specvlm.strategies.pruners.none import NonePruner
from specvlm.strategies.pruners.random import RandomPruner
from specvlm.strategies.pruners.two_stage import TwoStagePruner
from specvlm.strategies.pruners.uniform import UniformPruner
from specvlm.strategies.pruners.verifier_attention import VerifierAttentionPruner
from specvlm.strategies.pruners.window import WindowPruner


@hookimpl
def specvlm_strategies() -> list[type[Strategy]]:
    return [NonePruner, UniformPruner, RandomPruner, WindowPruner, VerifierAttentionPruner, TwoStagePruner, FastVPruner]
