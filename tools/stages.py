"""Sequential stages, one command each; finished stages are skipped."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from shards.command_line import run_command
from shards.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One command with its title."""

    title: str
    command: list[str]
    """Arguments of the Python interpreter."""
    finished: Callable[[], bool] | None = None
    """Function that returns True where the stage is finished; None where the command itself skips finished work."""


class StageError(UserError):
    """A stage failed. The message names the stage and the remedy."""


def run_stages(todo: list[Stage], console: Console) -> None:
    """Run the unfinished stages in order. Raise StageError at the first that fails."""
    for i, stage in enumerate(todo, start=1):
        console.rule(f"{i}/{len(todo)} {stage.title}", align="left")
        if stage.finished is not None and stage.finished():
            console.print("finished before, skipped")
            continue
        console.print(f"$ python {shlex.join(stage.command)}", style="dim", soft_wrap=True, highlight=False)
        start = time.monotonic()
        code = run_child([sys.executable, *stage.command])
        if code != 0:
            raise StageError(
                f"'{stage.title}' failed (exit code {code}, its message is above); fix it and rerun the command"
            )
        if stage.finished is not None and not stage.finished():
            raise StageError(f"'{stage.title}' was stopped before its end; rerun the command to resume")
        console.print(f"{time.monotonic() - start:.0f} s", style="dim")


def run_child(command: list[str]) -> int:
    """Run a command and return its exit code. On Ctrl-C, terminate it, wait until it has saved, and raise again."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def run_tool(name: str, work: Callable[[], int]) -> int:
    """Run `work` and return the tool's exit code: that of `work`, 1 after an error, 130 after Ctrl-C or SIGTERM.

    An error is printed in one line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_command(work, name)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; rerun the same command to resume", file=sys.stderr)
        return 130
