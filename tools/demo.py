"""The demo: photographs → shards → pretraining → MRR with its controls → grids, explorer, maps → report.

    python tools/demo.py [--out runs/demo] [--data data/demo]        # what `make demo` runs

Every stage is a command that is printed before it runs and that works by itself. Run again, it keeps the stages that
are finished and goes on in the middle of the one that was cut off. Paths are relative to the repository.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

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


@dataclass(frozen=True)
class Stage:
    """One command and what it is for."""

    title: str
    command: list[str]
    finished: Callable[[], bool] | None = None
    """Whether it was done to its end; None where the command itself keeps what is done."""


class DemoError(RuntimeError):
    """A stage failed; the message says which, and how to go on."""


def stages(options: Options) -> list[Stage]:
    """Everything the demo does, in order."""
    o = options
    tiles = ["tools/make_demo_data.py", str(o.data / "source"), "--train", str(o.tiles[0]), "--val", str(o.tiles[1])]
    steps = o.steps or demo().schedule.steps
    assert steps is not None
    return [
        Stage("Cut tiles from scikit-image's photographs", tiles, lambda: o.tiles_csv("val").exists()),
        *(_shard(o, split) for split in ("train", "val")),
        _train("Pretrain the world model", o, o.out, steps, []),
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


def run_stages(todo: list[Stage], console: Console) -> None:
    """Run the stages that are not finished. Raises DemoError at the first that fails."""
    for i, stage in enumerate(todo, start=1):
        console.rule(f"{i}/{len(todo)} {stage.title}", align="left")
        if stage.finished is not None and stage.finished():
            console.print("done before, kept")
            continue
        console.print(f"$ python {shlex.join(stage.command)}", style="dim", soft_wrap=True, highlight=False)
        start = time.monotonic()
        code = _run([sys.executable, *stage.command])
        if code != 0:
            raise DemoError(f"'{stage.title}' failed (exit code {code}, its message is above); mend it and run again")
        if stage.finished is not None and not stage.finished():
            raise DemoError(f"'{stage.title}' was stopped before its end; run again to go on from there")
        console.print(f"{time.monotonic() - start:.0f} s", style="dim")


def _run(command: list[str]) -> int:
    """Run a command to its end; its exit code. Stopped by Ctrl-C, it is asked to stop too, and waited for: it saves."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


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


def main() -> int:
    options, console, start = tyro.cli(Options), Console(), time.monotonic()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_stages(stages(options), console)
    except DemoError as error:
        print(f"tools/demo.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntools/demo.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    report = write_report(options.out)
    console.rule()
    console.print(summary(options.out))
    console.print(f"Look at {report} — {time.monotonic() - start:.0f} s in all", soft_wrap=True)
    if options.readme_pictures:
        shutil.copy(options.out / "eval" / "retrieval.png", IMAGES)
        part = ["--part", "section:has(.explorer)", "--width", "1180"]
        if _run([sys.executable, "tools/screenshot.py", str(report), str(IMAGES / "explorer.png"), *part]):
            return 1
        console.print(f"README's pictures: {IMAGES}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
