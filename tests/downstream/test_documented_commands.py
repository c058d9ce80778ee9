"""The commands in docs/downstream.md are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from iwm.downstream.registry import PROTOCOLS
from iwm.evaluate import parse

PAGE = (Path(__file__).parents[2] / "docs" / "downstream.md").read_text()
COMMANDS = [
    found.replace("\\\n", " ")
    for found in re.findall(r"iwm/evaluate\.py ((?:[^\n\\]|\\\n)+)", PAGE)
    if "…" not in found
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_understood(command: str) -> None:
    arguments = shlex.split(command)
    name, settings = parse(arguments)
    assert name == arguments[0]
    if name in PROTOCOLS:
        settings.check()


def test_every_protocol_that_trains_is_shown() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} >= PROTOCOLS.keys()
