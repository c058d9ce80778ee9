"""Check of commands that need DALI; importing this ends the program with one line where DALI is missing.

Commands import it before anything else, so that a missing package is not a traceback.
"""

from __future__ import annotations

import sys

try:
    import dali_pipelines.dali  # noqa: F401  # imported to see that it can be
except ModuleNotFoundError as error:
    sys.exit(f"{sys.argv[0]}: {error}")
