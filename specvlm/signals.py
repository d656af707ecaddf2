"""Moved to `specvlm.decoding.collect`; the next release removes this module."""

import warnings

from specvlm.decoding.collect import *  # noqa: F403

warnings.warn("specvlm.signals has moved: import from specvlm.decoding.collect", DeprecationWarning, stacklevel=2)
