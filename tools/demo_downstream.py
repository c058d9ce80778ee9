"""Downstream demo: every protocol of the paper (A.2) on the demo's small world model.

    python tools/demo_downstream.py [--run runs/demo]        # the command of `make downstream`, after pretraining

Each stage is one command, which is printed before it runs and also works alone. The protocols are shortened to finish
within minutes on two CPU cores. Where only heads are trained, features are cached.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from stages import Stage, run_stages, run_tool

from iwm.evaluation.result_table import ResultTable

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DownstreamOptions:
    """Run every downstream protocol on the demo's world model, in minutes."""

    run: Path = Path("runs/demo")
    """Folder of the pretraining run. The report is report.html in it."""
    steps: int | None = None
    """Training steps of every protocol. Default: the length that the demo sets for each protocol."""


@dataclass(frozen=True)
class DownstreamStage:
    """Shortened protocol: name, title, and arguments of iwm/evaluate.py."""

    protocol: str
    title: str
    arguments: str
    at_least: float
    """Lower bound (0 to 1) of every accuracy or mIoU in the summary, at the last epoch. The demo's is well above it."""


COLOUR = "--data.label colour"
CACHED = "--cache-features"
DOWNSTREAM_STAGES = (
    DownstreamStage(
        "linear",
        "Linear probes",
        f"{COLOUR} {CACHED} --epochs 20 --warmup-epochs 2 --batch-size 256 --micro-batch-size 256 "
        "--lr 1.6 3.2 6.4 12.8 25.6",
        0.45,
    ),
    DownstreamStage(
        "attentive", "Attentive probes", f"{COLOUR} {CACHED} --epochs 15 --batch-size 128 --lr 1e-3 1e-2", 0.6
    ),
    DownstreamStage(
        "finetune-encoder", "Finetune the encoder", f"{COLOUR} --epochs 8 --warmup-epochs 1 --batch-size 128", 0.5
    ),
    DownstreamStage(
        "finetune-predictor",
        "Finetune the predictor, pretrained and random, three seeds",
        f"{COLOUR} {CACHED} --epochs 3 --warmup-epochs 0.5 --batch-size 128 --seeds 0 1 2 --drop-path 0 "
        "--pretrained-lr-mult 1",
        0.5,
    ),
    DownstreamStage(
        "finetune-end-to-end",
        "Finetune encoder and predictor end to end",
        f"{COLOUR} --epochs 5 --warmup-epochs 1 --batch-size 128 "
        "--crops.rand-augment None --mixup.mixup 0 --mixup.cutmix 0",
        0.5,
    ),
    DownstreamStage(
        "multitask",
        "One predictor for two tasks, and one per task",
        f"--tasks colour place {CACHED} --epochs 4 --warmup-epochs 0.5 --batch-size 64 --drop-path 0",
        0.35,
    ),
    DownstreamStage(
        "segmentation",
        "Segment objects by their colour",
        "--parts encoder predictor --classes 7 --no-reduce-zero-label --channels 16 --lr 2e-3 5e-3 --steps 600 "
        "--batch-size 16 --validate-every 0.6 --crops.scale 1.6 2 --crops.photometric.jitter-probability 0",
        0.2,
    ),
)


def stages(options: DownstreamOptions) -> list[Stage]:
    """Return all stages, in order."""
    todo = [_stage(options, stage.protocol, stage.title, stage.arguments.split()) for stage in DOWNSTREAM_STAGES]
    todo.append(_stage(options, "knn", "Nearest neighbours (no training)", ["--label", "colour"], trains=False))
    table = ["iwm/evaluate.py", "table", "--runs", str(options.run)]
    return [*todo, Stage("The paper's tables with our results", table)]


def _stage(options: DownstreamOptions, protocol: str, title: str, arguments: list[str], trains: bool = True) -> Stage:
    from iwm.report.runs import is_up_to_date  # not at the top: it imports torch

    output = options.run / "eval" / f"{protocol}.json"
    command = ["iwm/evaluate.py", protocol, "--checkpoint", str(options.run), *arguments]
    if trains and options.steps is not None:
        command += ["--steps", str(options.steps)]
    return Stage(title, command, lambda: is_up_to_date(output, options.run))


def summary(run: Path) -> ResultTable:
    """Return a table of each protocol's result, with chance and the expected value."""
    rows = []
    for stage in DOWNSTREAM_STAGES:
        result = json.loads((run / "eval" / f"{stage.protocol}.json").read_bytes())
        for name, reached, chance in _figures(result):
            figures = (f"{100 * reached:.1f}", f"{100 * chance:.1f}", f"at least {100 * stage.at_least:.0f}")
            rows.append([name, *figures, "yes" if reached >= stage.at_least else "NO"])
    caption = (
        "Accuracy or mIoU in % on held-out images, averaged over seeds. Chance: predicting the majority class "
        "(for segmentation an upper bound: predicting background everywhere)."
    )
    columns = ["", "score", "chance", "expected", "reached"]
    return ResultTable("Downstream results of the world model", columns, rows, caption)


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield (name, accuracy or mIoU, chance) of each table row for a result."""
    from iwm.downstream.progress import choice_score  # not at the top: it imports torch

    protocol = result["protocol"]
    if protocol == "multitask":
        for task, scores in result["trials"]["multitask"]["scores"].items():
            yield f"multitask: {task}", scores["top1"]["mean"], result["tasks"][task]["chance"]
    elif protocol == "segmentation":
        # Background everywhere: its IoU is its share of the pixels, and all other IoUs are 0.
        for part in dict.fromkeys(trial["part"] for trial in result["trials"].values()):
            trials = [trial for trial in result["trials"].values() if trial["part"] == part]
            best = max(trials, key=lambda trial: choice_score(trial["best"]))
            yield f"segmentation: {part}", best["miou"]["mean"], 1 / result["classes"]
    elif protocol == "finetune-predictor":
        for kind in ("pretrained", "random"):
            means = [trial["top1"]["mean"] for trial in result["trials"].values() if trial["predictor"] == kind]
            yield f"{protocol}: {kind}", sum(means) / len(means), result["chance"]
    else:
        yield protocol, result["trials"][result["chosen"]]["top1"]["mean"], result["chance"]


def run(options: DownstreamOptions) -> int:
    """Run the unfinished stages, print the results and return the exit code. Raise StageError where a stage fails."""
    console, start = Console(), time.monotonic()
    run_stages(stages(options), console)
    console.rule()
    console.print(summary(options.run))
    console.print(f"Report: {options.run / 'report.html'} ({time.monotonic() - start:.0f} s in total)", soft_wrap=True)
    return 0


def main() -> int:
    options = tyro.cli(DownstreamOptions)
    os.chdir(ROOT)
    return run_tool("tools/demo_downstream.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
