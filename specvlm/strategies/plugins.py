"""The hook of plugins and their loader, under the path that plugins import.

The module itself is `specvlm.models.plugins`, below the model families that it loads.
"""

import sys

from specvlm.models import plugins
from specvlm.models.plugins import *  # noqa: F403  (for type checkers)

sys.modules[__name__] = plugins  # one module under both names
