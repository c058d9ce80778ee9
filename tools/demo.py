"""The demo: photographs → shards → pretraining → MRR with its controls → grids, explorer, maps → report.

    python tools/demo.py [--out runs/demo] [--data data/demo]        # what `make demo` runs

Every stage is a command that is printed before it runs and that works by itself. Run again, it keeps the stages that
are finished and goes on in the middle of the one that was cut off. Paths are relative to the repository.
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from stages import Stage, run_command, run_stages, run_tool

from iwm.evaluate import PROTOCOLS
from iwm.recipes import demo
from iwm.report.page import write_report
from iwm.report.run_folder import is_current
from iwm.training.checkpoint import path_of

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Path("docs/images")
CONTROL_SCENARIO = "destructive"
"""Table S2's row without jitter: the control is trained with it and asked about jitter all the same."""
CONTROL_FILE = "mrr-no-jitter.json"
"""The control's figures, beside the world model's own."""
BANK_SCENARIO = "default"
"""The bank that the control is asked about: the jitter that the world model is trained with."""
LABEL = "colour"
"""What linear accuracy is taken of: objects' colours. Their shapes are beyond a model of this size."""
PRETRAIN = "Pretrain the world model"
EXPECTED = {"at least": 0.25, "at most": 0.035}
"""Pooled MRR: of the world model at least, of a control at most."""


@dataclass(frozen=True)
class Options:
    """Train a small Image World Model on embedded data and measure what it learned, in under ten minutes."""

    out: Path = Path("runs/demo")
    """Folder of the run; its report.html is what to look at."""
    data: Path = Path("data/demo")
    """Folder of the demo's data and shards."""
    steps: int | None = None
    """Training steps; default: the recipe's."""
    control_steps: int = 1000
    """Training steps of the control without jitter."""
    tiles: tuple[int, int] = (4096, 384)
    """Training and validation tiles made."""
    until_trained: bool = False
    """Stop when the world model is trained, as what leverages it needs no more (tools/demo_downstream.py)."""
    readme_pictures: bool = False
    """Also renew README's pictures in docs/images/: what predictions retrieve, and the explorer (needs a Chromium)."""

    @property
    def control(self) -> Path:
        """Folder of the control's run."""
        return self.out.with_name(f"{self.out.name}-no-jitter")

    def tiles_csv(self, split: str) -> Path:
        """Where make_demo_data.py puts a split's table."""
        return self.data / "source" / split / "tiles.csv"

    @property
    def shards(self) -> Path:
        return self.data / "shards"


def stages(options: Options) -> list[Stage]:
    """Everything the demo does, in order."""
    o = options
    tiles = ["tools/make_demo_data.py", str(o.data / "source"), "--train", str(o.tiles[0]), "--val", str(o.tiles[1])]
    steps = o.steps or demo().schedule.steps
    assert steps is not None
    return [
        Stage("Cut tiles from scikit-image's photographs", tiles, lambda: o.tiles_csv("val").exists()),
        *(_shard(o, split) for split in ("train", "val")),
        _train(PRETRAIN, o, o.out, steps, []),
        _train(
            "Control: the same model trained without jitter",
            o,
            o.control,
            o.control_steps,
            ["--scenario", CONTROL_SCENARIO],
        ),
        _measure("Measure the control on the bank that the world model is measured on", o),
        _show("Judge the world model and draw what it can do", o),
    ]


def _shard(options: Options, split: str) -> Stage:
    command = ["tools/make_shards.py", str(options.tiles_csv(split)), str(options.shards)]
    return Stage(f"Write {split} shards", [*command, "--split", split])


def _train(title: str, options: Options, run: Path, steps: int, more: list[str]) -> Stage:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "iwm/train.py", "demo"]
    chosen = ["--run-dir", str(run), "--data.shards", str(options.shards), "--schedule.steps", str(steps), *more]
    return Stage(title, [*launch, *chosen], lambda: path_of(run, steps).exists())


def _measure(title: str, options: Options) -> Stage:
    output = options.out / "eval" / CONTROL_FILE
    bank = ["--bank.scenario", BANK_SCENARIO]
    command = ["iwm/evaluate.py", "mrr", "--checkpoint", str(options.control), "--output", str(output), *bank]
    return Stage(title, command, lambda: is_current(output, options.control))


def _show(title: str, options: Options) -> Stage:
    outputs = [options.out / "eval" / f"{name}.json" for name in PROTOCOLS]
    command = ["iwm/evaluate.py", "world-model", "--checkpoint", str(options.out), "--label", LABEL]
    return Stage(title, command, lambda: all(is_current(output, options.out) for output in outputs))


def summary(out: Path) -> Table:
    """The figures that the demo is about, beside what is expected of them."""
    own, control = (_read(out / "eval" / name) for name in ("mrr.json", CONTROL_FILE))
    table = Table(title="Can the predictor apply the action that it is told?", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("MRR, pooled", "per token", "expected", ""):
        table.add_column(column, justify="right", no_wrap=True)
    rows = (
        ("the world model", own["mrr"], "at least"),
        ("… told shuffled actions", own["shuffled_actions"], "at most"),
        ("trained without jitter", control["mrr"], "at most"),
    )
    for name, scores, bound in rows:
        pooled, limit = scores["pooled"]["teacher"]["mean"], EXPECTED[bound]
        good = pooled >= limit if bound == "at least" else pooled <= limit
        cells = (f"{s['mean']:.3f} ±{s['standard_error']:.3f}" for s in (scores[d]["teacher"] for d in scores))
        table.add_row(name, *cells, f"{bound} {limit}", "yes" if good else "[bold]NO[/]")
    table.add_row("guessing", f"{own['chance']:.3f}", f"{own['chance']:.3f}", "", "")
    return table


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_bytes())
    return result


def run(options: Options) -> int:
    """Run what is not done yet and show what came out; the exit code. Raises StageError where a stage fails."""
    console, start = Console(), time.monotonic()
    todo = stages(options)
    run_stages(todo[: [stage.title for stage in todo].index(PRETRAIN) + 1] if options.until_trained else todo, console)
    if options.until_trained:
        return 0
    report = write_report(options.out)
    console.rule()
    console.print(summary(options.out))
    console.print(f"Look at {report} — {time.monotonic() - start:.0f} s in all", soft_wrap=True)
    if options.readme_pictures:
        shutil.copy(options.out / "eval" / "retrieval.png", IMAGES)
        part = ["--part", "section:has(.explorer)", "--width", "1180"]
        if run_command([sys.executable, "tools/screenshot.py", str(report), str(IMAGES / "explorer.png"), *part]):
            return 1
        console.print(f"README's pictures: {IMAGES}", soft_wrap=True)
    return 0


def main() -> int:
    options = tyro.cli(Options)
    os.chdir(ROOT)
    return run_tool("tools/demo.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
