"""Moved to `specvlm.toolkit.segments`; this path goes with the next release."""

import warnings

from specvlm.toolkit.segments import *  # noqa: F403

warnings.warn("specvlm.segments has moved: import from specvlm.toolkit.segments", DeprecationWarning, stacklevel=2)
