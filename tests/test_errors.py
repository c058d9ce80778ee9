"""Errors of commands: one line on stderr, exit status 1, and options named as the user types them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import tyro

from dali_pipelines.augmentations import AugmentationError
from iwm.config import ConfigError
from iwm.ranges import Range, check_ranges
from shards.command_line import run_command
from shards.errors import ShardError, UserError


@dataclass(frozen=True)
class Part:
    num_views: Annotated[int, Range(min=2)] = 2


@dataclass(frozen=True)
class Settings:
    part: Part = field(default_factory=Part)
    rate: Annotated[float, Range(above=0, below=math.inf)] = 1.0
    share: Annotated[float, Range(min=0, max=1)] = 0.5
    most: Annotated[int | None, Range(min=1)] = None
    sizes: Annotated[tuple[int, ...], Range(min=1)] = (1, 2)


@dataclass(frozen=True)
class OtherDefaults(Settings):
    rate: float = 2.0


@pytest.mark.parametrize(
    ("settings", "prefix", "message"),
    [
        (Settings(part=Part(1)), "--", "--part.num-views 1: must be at least 2"),
        (Settings(part=Part(1)), "", "part.num_views 1: must be at least 2"),
        (Settings(rate=0.0), "--", "--rate 0.0: must be above 0 and finite"),
        (Settings(rate=math.inf), "--", "--rate inf: must be above 0 and finite"),
        (Settings(rate=math.nan), "--", "--rate nan: must be above 0 and finite"),
        (Settings(share=1.5), "data.", "data.share 1.5: must be from 0 to 1"),
        (Settings(most=0), "--", "--most 0: must be at least 1"),
        (Settings(sizes=(3, 0)), "--", "--sizes 3 0: each must be at least 1"),
        (OtherDefaults(rate=-1.0), "--", "--rate -1.0: must be above 0 and finite"),
    ],
)
def test_a_field_outside_its_range_is_named(settings: Settings, prefix: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_ranges(settings, prefix)
    assert str(refused.value) == message


def test_what_is_inside_passes_and_tyro_reads_it() -> None:
    check_ranges(Settings(share=1.0, most=1, sizes=()))
    check_ranges(tyro.cli(OtherDefaults, args=["--part.num-views", "3", "--most", "None", "--sizes", "4"]))


@pytest.mark.parametrize(
    "error",
    [UserError("a.csv: no column 'label';\nname another"), ShardError("x"), AugmentationError("x"), OSError("x")],
)
def test_a_mistake_ends_a_command_with_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    assert run_command(main, "tools/x.py") == 1
    assert capsys.readouterr().err == f"tools/x.py: {' '.join(str(error).splitlines())}\n"


@pytest.mark.parametrize(("main", "status"), [(lambda: None, 0), (lambda: 3, 3)])
def test_a_command_ends_with_its_own_status(main: Callable[[], int | None], status: int) -> None:
    assert run_command(main, "tools/x.py") == status


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0, "tools/x.py")
    with pytest.raises(SystemExit):
        run_command(lambda: sys.exit(2), "tools/x.py")
