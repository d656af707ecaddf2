"""Moved to `specvlm.strategies`; this path goes with the next release."""

import warnings

from specvlm.strategies import *  # noqa: F403

warnings.warn("specvlm.strategy has moved: import from specvlm.strategies", DeprecationWarning, stacklevel=2)
