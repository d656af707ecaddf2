"""The built-in pruners, one a file. They reach the registry through the hook that plugins use."""

from specvlm.plugins import hookimpl
from specvlm.pruners.fastv import FastVPruner
from specvlm.pruners.none import NonePruner
from specvlm.pruners.random import RandomPruner
from specvlm.pruners.two_stage import TwoStagePruner
from specvlm.pruners.uniform import UniformPruner
from specvlm.pruners.verifier_attention import VerifierAttentionPruner
from specvlm.pruners.window import WindowPruner
from specvlm.strategy import Strategy


@hookimpl
def specvlm_strategies() -> list[type[Strategy]]:
    return [NonePruner, UniformPruner, RandomPruner, WindowPruner, VerifierAttentionPruner, TwoStagePruner, FastVPruner]
