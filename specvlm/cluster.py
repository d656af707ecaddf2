"""Moved to `specvlm.toolkit.cluster`; the next release removes this module."""

import warnings

from specvlm.toolkit.cluster import *  # noqa: F403

warnings.warn("specvlm.cluster has moved: import from specvlm.toolkit.cluster", DeprecationWarning, stacklevel=2)
