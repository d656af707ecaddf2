"""Built-in verifiers, one per file, registered through the same hook as plugins."""

from specvlm.strategies.plugins import hookimpl
from specvlm.strategies.verifiers.coupled import CoupledVerifier
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.strategies.verifiers.loose import LooseVerifier
from specvlm.strategies.verifiers.sampling import SamplingVerifier


@hookimpl
def specvlm_strategies() -> list[type]:
    return [GreedyVerifier, SamplingVerifier, CoupledVerifier, LooseVerifier]
