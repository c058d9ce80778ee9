"""Errors that a user can fix, and the wrapper that reports them in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Error of the user's input or the machine's state; the message names the file or field and the remedy."""


class ShardError(UserError, ValueError):
    """Invalid shards; the message names the file, the field and the remedy."""


def run_command(main: Callable[[], int | None], name: str) -> int:
    """Run a command; return its exit status, or print one line on stderr and return 1 for a UserError or OSError."""
    try:
        return main() or 0
    except (UserError, OSError) as error:
        print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
