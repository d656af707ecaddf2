"""Moved to `specvlm.models.passes`; this path goes with the next release."""

import warnings

from specvlm.models.passes import *  # noqa: F403

warnings.warn("specvlm.passes has moved: import from specvlm.models.passes", DeprecationWarning, stacklevel=2)
