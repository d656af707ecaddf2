"""Moved to `specvlm.strategies.plugins`; the next release removes this module."""

import warnings

from specvlm.strategies.plugins import *  # noqa: F403

warnings.warn("specvlm.plugins has moved: import from specvlm.strategies.plugins", DeprecationWarning, stacklevel=2)
