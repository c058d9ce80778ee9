"""The command `iwm`: its subcommands, one-line answers, and help without importing torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import iwm
from iwm.__main__ import COMMANDS, main


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert main([]) == 2


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"iwm {iwm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "iwm: no command 'trian'; did you mean 'train'? The choices are shards, verify,"),
        (["train", "cpu_smal"], "iwm train: no recipe 'cpu_smal'; did you mean 'cpu_small'?"),
        (["evaluate", "mmr"], "iwm evaluate: no evaluation 'mmr'; did you mean 'mrr'?"),
        (["report"], "iwm report: no run is given"),
        (["export", "nowhere", "out"], "iwm export: nowhere"),
        (["ablate", "conditioning", "nothing"], "iwm ablate: RECIPE: 'nothing' is not a recipe"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(answer)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--help", 0),
        ("shards --help", 0),
        ("verify --help", 0),
        ("train demo --help", 0),
        ("train demo --optim.lrr 3", 2),
        ("train demo --data.shards nowhere", 1),
        ("evaluate mrr --help", 0),
        ("evaluate mrr --checkpoint nowhere", 1),
        ("evaluate linear --chekpoint x", 2),
        ("ablate --help", 0),
        ("report --help", 0),
        ("export --help", 0),
        ("export nowhere out", 1),
        ("bench --help", 0),
        ("bench all --repeets 3", 2),
    ],
)
def test_help_and_mistyped_options_import_neither_torch_nor_dali(line: str, status: int) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "iwm", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == status, done.stderr[-2000:]
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in done.stderr.splitlines() if "|" in row}
    assert "tyro" in imported
    assert not imported & {"torch", "nvidia", "timm", "matplotlib", "scipy"}
