"""The built-in verifiers, one a file."""

from specvlm.plugins import hookimpl
from specvlm.verifiers.greedy import GreedyVerifier
from specvlm.verifiers.loose import LooseVerifier
from specvlm.verifiers.sampling import SamplingVerifier


@hookimpl
def specvlm_strategies() -> list[type]:
    return [GreedyVerifier, SamplingVerifier, LooseVerifier]
