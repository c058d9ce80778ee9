"""Make or verify WebDataset shards for DALI: iwm shards SRC OUT, iwm verify OUT. README.md specifies the format."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from shards.errors import ShardError
from shards.make import ShardingOptions, make_shards
from shards.urls import is_url
from shards.verify import verify_shards
from shards.verify_remote import verify_remote


@dataclass(frozen=True)
class VerifyShards:
    """Check a shard folder against its manifest: hashes, indices, counts, labels, keys, and every image."""

    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The shard folder, or its URL (s3://, gs://, hf://, https://)."""
    quick: bool = False
    """Skip the decoding of images. At a URL, compare sizes with the manifest and read no shard."""
    workers: int | None = None
    """Number of worker processes; None for one per core."""


class Stopped(KeyboardInterrupt):
    """Interruption by Ctrl-C (SIGINT) or SIGTERM."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str] | None = None, prog: str = "make_shards.py") -> int:
    """Run the command and return its exit code: 0 success, 1 error or failed check, 128 + N stopped by signal N.

    arguments: those of making shards, or `verify` and those of verifying; None: the program's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(highlight=False, markup=False, soft_wrap=True)
    errors = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if arguments[:1] == ["verify"]:
            options = tyro.cli(VerifyShards, prog=f"{prog} verify", args=arguments[1:])
            problems = _verify(options, console)
            for problem in problems:
                errors.print(f"error: {_printable(problem)}")
            return 1 if problems else 0
        make_shards(tyro.cli(OmitArgPrefixes[ShardingOptions], prog=prog, args=arguments), console)
    except ShardError as error:
        errors.print(f"error: {_printable(str(error))}")
        return 1
    except Stopped as stop:
        errors.print("stopped; finished shards are kept; rerun the same command to resume")
        return 128 + stop.number
    return 0


def _verify(options: VerifyShards, console: Console) -> list[str]:
    if is_url(options.out):
        return verify_remote(options.out, quick=options.quick, workers=options.workers, console=console)
    return verify_shards(Path(options.out), decode=not options.quick, workers=options.workers, console=console)


def _printable(text: str) -> str:
    """Escape bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main(prog="python -m shards"))
