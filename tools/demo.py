"""Demo: photographs → shards → pretraining → MRR with its controls → sweeps, explorer, feature maps → report.

    python tools/demo.py [--out runs/demo] [--data data/demo]        # the command of `make demo`

Each stage is one command, which is printed before it runs and also works alone. Rerun the same command to resume:
finished stages are skipped, and an interrupted one is resumed. Paths are relative to the repository.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from stages import Stage, run_child, run_stages, run_tool

from iwm.evaluation.result_table import ResultTable
from iwm.recipes import demo

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Path("docs/images")
PICTURES = {"retrieval": ("#retrieval .pictures", 824), "explorer": ("section:has(.explorer)", 1180)}
"""Parts of the page in README, by file name: CSS selector, and width of the window (pixels)."""
CONTROL_SCENARIO = "destructive"
"""Scenario without jitter (table S2). The control is trained with it and evaluated with jitter."""
CONTROL_FILE = "mrr-no-jitter.json"
"""Name of the control's result in the eval folder of the world model."""
BANK_SCENARIO = "default"
"""Scenario of the control's bank, with the jitter of the world model's training."""
LABEL = "colour"
"""Label column of the linear accuracy: the objects' colours. A model of this size cannot learn their shapes."""
PRETRAIN = "Pretrain the world model"
EXPECTED = {"at least": 0.25, "at most": 0.035}
"""Bounds of the pooled MRR (0 to 1): `at least` for the world model, `at most` for a control."""


@dataclass(frozen=True)
class DemoOptions:
    """Train and evaluate a small Image World Model on tiles of scikit-image's photographs."""

    out: Path = Path("runs/demo")
    """Folder of the run. The report is report.html in it."""
    data: Path = Path("data/demo")
    """Folder of the demo's images and shards."""
    steps: int | None = None
    """Training steps. Default: the number in the recipe."""
    control_steps: int = 1000
    """Training steps of the control, which is trained without jitter: fewer, because it does not leave chance."""
    tiles: tuple[int, int] = (4096, 384)
    """Number of training and validation tiles."""
    until_trained: bool = False
    """Stop after the world model's training; tools/demo_downstream.py needs no more."""
    readme_pictures: bool = False
    """Also update the images of README in docs/images (retrieval and explorer). This needs Chromium."""

    @property
    def control(self) -> Path:
        """Folder of the control's run."""
        return self.out.with_name(f"{self.out.name}-no-jitter")

    def tiles_csv(self, split: str) -> Path:
        """Return the path of a split's table, as written by make_demo_data.py."""
        return self.data / "source" / split / "tiles.csv"

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.data / "shards"


def stages(options: DemoOptions) -> list[Stage]:
    """Return all stages of the demo, in order."""
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
        _measure("Evaluate the control on the world model's bank", o),
        _show("Evaluate the world model and draw its figures", o),
    ]


def _shard(options: DemoOptions, split: str) -> Stage:
    command = ["tools/make_shards.py", str(options.tiles_csv(split)), str(options.shards)]
    return Stage(f"Write {split} shards", [*command, "--split", split])


def _train(title: str, options: DemoOptions, run: Path, steps: int, extra: list[str]) -> Stage:
    from iwm.training.checkpoint import checkpoint_path  # here and below, not at the top: it imports torch

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "iwm/train.py", "demo"]
    chosen = ["--run-dir", str(run), "--data.shards", str(options.shards), "--schedule.steps", str(steps), *extra]
    return Stage(title, [*launch, *chosen], lambda: checkpoint_path(run, steps).exists())


def _measure(title: str, options: DemoOptions) -> Stage:
    from iwm.report.runs import is_up_to_date

    output = options.out / "eval" / CONTROL_FILE
    bank = ["--bank.scenario", BANK_SCENARIO]
    command = ["iwm/evaluate.py", "mrr", "--checkpoint", str(options.control), "--output", str(output), *bank]
    return Stage(title, command, lambda: is_up_to_date(output, options.control))


def _show(title: str, options: DemoOptions) -> Stage:
    from iwm.evaluation.registry import EVALUATORS
    from iwm.report.runs import is_up_to_date

    outputs = [options.out / "eval" / f"{name}.json" for name in EVALUATORS]
    command = ["iwm/evaluate.py", "world-model", "--checkpoint", str(options.out), "--label", LABEL]
    return Stage(title, command, lambda: all(is_up_to_date(output, options.out) for output in outputs))


def summary(out: Path) -> ResultTable:
    """Return a table of the demo's MRR values and their expected bounds."""
    own, control = (_read(out / "eval" / name) for name in ("mrr.json", CONTROL_FILE))
    own_steps, control_steps = (int(Path(result["checkpoint"]).stem.removeprefix("step-")) for result in (own, control))
    results = (
        (f"the world model, {own_steps:,} steps", own["mrr"], "at least"),
        ("… with shuffled actions", own["shuffled_actions"], "at most"),
        (f"trained without jitter, {control_steps:,} steps", control["mrr"], "at most"),
    )
    rows = []
    for name, scores, bound in results:
        pooled, limit = scores["pooled"]["teacher"]["mean"], EXPECTED[bound]
        good = pooled >= limit if bound == "at least" else pooled <= limit
        cells = (f"{s['mean']:.3f} ±{s['standard_error']:.3f}" for s in (scores[d]["teacher"] for d in scores))
        rows.append([name, *cells, f"{bound} {limit}", "yes" if good else "NO"])
    rows.append(["chance", f"{own['chance']:.3f}", f"{own['chance']:.3f}", "", ""])
    columns = ["", "MRR, pooled", "per token", "expected", "reached"]
    return ResultTable("Does the predictor apply the given action?", columns, rows)


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_bytes())
    return result


def run(options: DemoOptions) -> int:
    """Run the unfinished stages, print the results and return the exit code. Raise StageError where a stage fails."""
    # Imported here: torch and DALI take seconds that a mistyped option must not cost.
    from iwm.report.page import write_report

    console, start = Console(), time.monotonic()
    todo = stages(options)
    run_stages(todo[: [stage.title for stage in todo].index(PRETRAIN) + 1] if options.until_trained else todo, console)
    if options.until_trained:
        return 0
    report = write_report(options.out)
    console.rule()
    console.print(summary(options.out))
    console.print(f"Report: {report} ({time.monotonic() - start:.0f} s in total)", soft_wrap=True)
    if options.readme_pictures:
        for name, (part, width) in PICTURES.items():
            picture = [str(IMAGES / f"{name}.png"), "--part", part, "--width", str(width)]
            if run_child([sys.executable, "tools/screenshot.py", str(report), *picture]):
                return 1
        console.print(f"README's pictures: {IMAGES}", soft_wrap=True)
    return 0


def main() -> int:
    options = tyro.cli(DemoOptions)
    os.chdir(ROOT)
    return run_tool("tools/demo.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
