"""Messages and commands of docs/troubleshooting.md are those of the code."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from iwm.config import Config
from iwm.config_io import to_dict
from iwm.evaluate import parse as parse_evaluate
from iwm.train_options import parse as parse_train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = [line for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    for command in re.findall(r"(?:iwm |-m iwm\.)((?:train|evaluate) (?:[^\n\\]|\\\n)+)", block)
]


@cache
def texts() -> list[str]:
    """Return the strings of the code, with … for what a formatted string inserts."""
    found = []
    for file in (path for folder in ("shards", "dali_pipelines", "iwm") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(x.value if isinstance(x, ast.Constant) else "…" for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message: str) -> None:
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 2]
    assert parts
    assert [part for part in parts if not any(part in text for text in texts())] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    name, *arguments = shlex.split(command)
    {"train": parse_train, "evaluate": parse_evaluate}[name](arguments)


def test_an_option_of_a_section_exists() -> None:
    fields = {f"{section}.{name}" for section, value in to_dict(Config()).items() if value for name in value}
    named = re.findall(r"`(?:--)?((?:data|views|encoder|predictor|action|optim|schedule|train|log)\.[\w-]+)[ `]", PAGE)
    known = fields | {"data.split"}  # an option of evaluations
    assert [name for name in named if name.replace("-", "_").replace("no_", "") not in known] == []
