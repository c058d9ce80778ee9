"""Command lines: one-line errors, and commands that consist of several subcommands."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from shards.errors import UserError


def run_command(main: Callable[[], int | None], name: str) -> int:
    """Run a command; return its exit status, or print one line on stderr and return 1 for a UserError or OSError."""
    try:
        return main() or 0
    except (UserError, OSError) as error:
        print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1


class Subcommand(NamedTuple):
    """Options of a subcommand: their class, and their default values where these differ from the class's."""

    options: type
    default: Any = None
    summary: str | None = None
    """Description for --help; None: the docstring of the class."""

    @property
    def text(self) -> str:
        return (self.summary or self.options.__doc__ or "").strip()


def parse_subcommand(
    subcommands: Mapping[str, Subcommand], arguments: Sequence[str], *, prog: str, description: str | None, noun: str
) -> tuple[str, Any]:
    """Parse the name of a subcommand and its options; return the name and the options.

    Help and errors are those of the chosen subcommand alone. Without a name, or with --help in its place, the
    subcommands are listed and the program exits. noun: kind of name, for messages. Raises UserError for an unknown
    name, SystemExit for invalid options.
    """
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        print_overview({key: sub.text for key, sub in subcommands.items()}, prog, description, noun)
        raise SystemExit(0 if name else 2)
    chosen = subcommands.get(name)
    if chosen is None:
        raise UserError(unknown_name(noun, name, subcommands))
    values = {} if chosen.default is None else {"default": chosen.default}
    options: Any = tyro.cli(
        chosen.options,
        args=rest,
        prog=f"{prog} {name}",
        description=chosen.text,
        config=(tyro.conf.AvoidSubcommands,),
        **values,
    )
    return name, options


def unknown_name(noun: str, name: str, known: Collection[str]) -> str:
    """Return the message for a name that does not exist, with the most similar one and all that do."""
    similar = difflib.get_close_matches(name, known, n=1)
    suggestion = f"did you mean '{similar[0]}'? The choices are" if similar else "choose one of"
    return f"no {noun} '{name}'; {suggestion} {', '.join(known)}"


def print_overview(texts: Mapping[str, str], prog: str, description: str | None, noun: str) -> None:
    """Print the description, and the first line of each name's text."""
    console = Console(highlight=False, markup=False, emoji=False)
    metavar = noun.upper()
    console.print(f"usage: {prog} {metavar} [OPTIONS]\n\n{(description or '').strip()}\n", soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in texts.items():
        table.add_row(name, text.partition("\n")[0])
    console.print(table)
    console.print(f"\n`{prog} {metavar} --help` lists its options.", soft_wrap=True)
