"""Moved to `specvlm.toolkit.segments`; the next release removes this module."""

import warnings

from specvlm.toolkit.segments import *  # noqa: F403

warnings.warn("specvlm.segments has moved: import from specvlm.toolkit.segments", DeprecationWarning, stacklevel=2)
