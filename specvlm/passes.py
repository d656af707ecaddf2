"""Moved to `specvlm.models.passes`; the next release removes this module."""

import warnings

from specvlm.models.passes import *  # noqa: F403

warnings.warn("specvlm.passes has moved: import from specvlm.models.passes", DeprecationWarning, stacklevel=2)
