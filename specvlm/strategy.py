"""Moved to `specvlm.strategies`; the next release removes this module."""

import warnings

from specvlm.strategies import *  # noqa: F403

warnings.warn("specvlm.strategy has moved: import from specvlm.strategies", DeprecationWarning, stacklevel=2)
