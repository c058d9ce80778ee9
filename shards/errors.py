"""Errors that a user can fix. `run_command` (command_line.py) reports them in one line."""

from __future__ import annotations


class UserError(Exception):
    """Error of the user's input or the machine's state; the message names the file or field and the remedy."""


class ShardError(UserError, ValueError):
    """Invalid shards; the message names the file, the field and the remedy."""


def one_line(error: BaseException) -> str:
    """Return the message of an error of other code as one line."""
    return " ".join(str(error).split())
