"""DALI check for commands whose options need DALI: importing this module exits with a line where it is missing.

Commands that read their options first need no check: `run_command` prints the same line.
"""

from __future__ import annotations

import sys

try:
    import dali_pipelines.dali  # noqa: F401  # fails where DALI is missing
except ModuleNotFoundError as error:
    sys.exit(f"{sys.argv[0]}: {error}")
