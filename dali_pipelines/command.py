"""DALI check for commands: importing this module exits with a one-line message where DALI is missing.

Commands import it before what needs DALI, so that a missing package is not a traceback.
"""

from __future__ import annotations

import sys

try:
    import dali_pipelines.dali  # noqa: F401  # fails where DALI is missing
except ModuleNotFoundError as error:
    sys.exit(f"{sys.argv[0]}: {error}")
