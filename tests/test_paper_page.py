"""The commands of docs/paper.md: every one is understood, and (long) runs to its end at tiny size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from iwm import ablate, evaluate, train_options
from iwm.ablation.evaluations import protocol_evaluations, split_sections
from iwm.ablation.studies import STUDIES, AblateOptions
from iwm.config import Config, DataConfig
from iwm.downstream.registry import PROTOCOLS
from iwm.report import __main__ as report
from tests.downstream.conftest import boxes, small, untrained
from tests.training.runs import ROOT, TINY

__all__ = ["boxes", "small"]

PAGE = (ROOT / "docs" / "paper.md").read_text()
COMMANDS = list(dict.fromkeys(re.findall(r"`((?:python|torchrun) [^`]*)`", PAGE)))
TABLES = [*(str(i) for i in range(1, 9)), *(f"S{i}" for i in range(1, 7))]
FIGURES = [*(str(i) for i in range(1, 6)), *(f"S{i}" for i in range(1, 12))]

PROTOCOL = (
    *("--steps", "2", "--batch-size", "20", "--micro-batch-size", "None", "--warmup-epochs", "0"),
    *("--data.num-threads", "1"),
)
"""Options that make any protocol tiny."""

BANK = ("--bank.num-images", "3", "--bank.num-views", "8")
TINY_OPTIONS = {
    "retrieval": BANK,
    "similarity": ("--num-images", "3", "--num-views", "2", "--num-shown", "2"),
    "parameter-sweep": ("--num-images", "2", "--num-values", "3", "--num-sigmas", "2", "--num-shown", "1"),
    "marginalisation": (*BANK, "--predictions", "1", "2"),
}
"""Options that make an evaluator tiny."""


def _script(command: str) -> tuple[str, list[str]]:
    """Return the script or module of a command, and its arguments."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "iwm.report")
    return words[start], words[start + 1 :]


def _named(row: str) -> set[str]:
    """Return the numbers at the beginning of a row: `1, S5 to S8, retrieval` is 1, S5, S6, S7 and S8."""
    found = set()
    for first, last in re.findall(r"\b(S?\d+)(?: to S(\d+))?(?=[,;])", row):
        found.add(first)
        if last:
            found |= {f"S{i}" for i in range(int(first[1:]), int(last) + 1)}
    return found


def test_every_table_and_figure_has_its_row() -> None:
    tables, figures = PAGE.split("## Figures")
    rows = re.findall(r"^\| ([^|]*) \|", tables.split("## Tables")[1], re.M)
    assert set().union(*map(_named, rows)) == set(TABLES)
    rows = re.findall(r"^\| ([^|]*) \|", figures, re.M)
    assert set().union(*map(_named, rows)) == set(FIGURES)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    script, arguments = _script(command)
    if script == "iwm/evaluate.py":
        name, settings = evaluate.parse(arguments)
        if name in PROTOCOLS:
            settings.check()
    elif script == "iwm/train.py":
        train_options.parse(arguments).config.check()
    elif script == "iwm/ablate.py":
        own, training, sections = split_sections(arguments)
        options = tyro.cli(AblateOptions, args=own)
        assert options.study in STUDIES
        train_options.parse([options.recipe, *training]).config.check()
        protocol_evaluations(sections)
    else:
        assert script == "iwm.report"
        assert tyro.cli(report.ReportOptions, args=arguments).runs


# At tiny size


@pytest.fixture
def place(tmp_path: Path, boxes: Path, small: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the commands find their runs, data and checkpoint, all tiny."""
    (tmp_path / "data").mkdir()
    for name in ("imagenet", "inat18", "sun397", "places205", "ade20k"):
        (tmp_path / "data" / name).symlink_to(boxes, target_is_directory=True)
    config = replace(small, data=DataConfig(shards=str(boxes)))
    for name in ("runs/ijepa_b16_12x384", "runs/iwm_b16_inv_12x384", "runs/iwm_b16_equi_18x384", "RUN"):
        untrained(tmp_path / name, config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _tiny_training(arguments: list[str]) -> list[str]:
    words = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    return [*arguments, *words, "--views.size", "32", "--encoder.patch-size", "8", "--encoder.num-heads", "2",
            "--schedule.steps", "2", "--train.no-compile", "--log.no-tensorboard"]  # fmt: skip


def _tiny_protocol(name: str, arguments: list[str]) -> list[str]:
    """Return a protocol's arguments with tiny options; lengths of the page are dropped."""
    kept = re.sub(r"--epochs \d+", "", shlex.join(arguments))
    crops = name not in ("linear", "attentive", "segmentation")
    more = ["--crops.rand-augment", "None"] if crops else []
    more += ["--classes", "3", "--channels", "8"] if name == "segmentation" else []
    return [*shlex.split(kept), *PROTOCOL, *more]


def _run_tiny(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, arguments = _script(command)
    if script == "iwm/evaluate.py":
        name = arguments[0]
        more = _tiny_protocol(name, arguments) if name in PROTOCOLS else [*arguments, *TINY_OPTIONS.get(name, ())]
        evaluate.main(more)
    elif script == "iwm/train.py":
        from iwm.train import main

        shutil.rmtree("runs")  # these commands make them
        main(_tiny_training(arguments))
    elif script == "iwm/ablate.py":
        own, training, sections = split_sections(arguments)
        study = STUDIES[own[0]]
        monkeypatch.setitem(STUDIES, own[0], lambda recipe: replace(study(recipe), variants=study(recipe).variants[:1]))
        own[own.index("--processes") + 1] = "1"
        shown = [word for each in sections for word in ("--", each[0], *_tiny_protocol(each[0], each[1:]))]
        ablate.main([*own, *BANK, "--", *_tiny_training(training), *shown])
    else:
        report.main(arguments)


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "table --runs" in command:
        evaluate.main(_tiny_protocol("linear", ["linear", "--checkpoint", "runs/ijepa_b16_12x384"]))
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    _run_tiny(command, monkeypatch)
    written = {path for path in place.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert written
    for path in written:
        if path.suffix == ".json" and path.parent.name == "eval":
            assert json.loads(path.read_bytes())["tables"] or path.stem == "retrieval"
    if "iwm/ablate.py" in command:
        [tables] = [path for path in written if path.name == "tables.md"]
        assert "paper" in tables.read_text()
        assert capsys.readouterr().out.count("trained in") == 1
