"""Metric logging: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from shards.atomic import write_atomically

METRICS = "metrics.jsonl"

DISPLAY_FORMATS = {
    "loss": "{:.4f}",
    "mrr_pooled": "{:.3f}",
    "top1": "{:.1%}",
    "miou": "{:.1%}",
    "images_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
    "data_wait": "{:.1%}",
    "memory_gib": "{:.2f} GiB",
    "gradient_norm": "{:.3f}",
    "lr": "{:.2e}",
    "feature_std": "{:.3f}",
    "rankme": "{:.1f}",
    "skipped": "{:.0f}",
}


def truncate_metrics_after(run: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, from which the run resumes, and a line that a kill cut short."""
    path = run / METRICS
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _is_line_up_to(line, step)]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def _is_line_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


def memory_gib(device: torch.device) -> float:
    """Return the peak memory (GiB): of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricLogger:
    """Display and file output of a run's metrics; inactive on processes other than rank 0.

    On a terminal: a live table and a progress bar. Elsewhere: one plain line per measurement.
    """

    def __init__(
        self,
        run: Path,
        title: str,
        steps: int,
        start: int,
        *,
        main: bool,
        tensorboard: bool,
        console: Console | None = None,
    ) -> None:
        self._main = main
        if not main:
            return
        self._console = console or Console()
        self._path = run / METRICS
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start) if tensorboard else None
        self._title, self._latest = title, dict[str, float]()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._bar = self._progress.add_task("training", total=steps, completed=start)
        self._steps, self._start, self._began = steps, start, time.monotonic()
        self._live = Live(self._render(), console=self._console, refresh_per_second=4) if self._is_terminal else None

    @property
    def _is_terminal(self) -> bool:
        return self._console.is_terminal

    def __enter__(self) -> MetricLogger:
        if self._main and self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._main:
            return
        if self._live is not None:
            self._live.stop()
        if self._board is not None:
            self._board.close()

    def print(self, text: str) -> None:
        """Print one line of text."""
        if self._main:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def set_step(self, step: int) -> None:
        """Update the progress bar to `step` completed steps."""
        if self._main:
            self._progress.update(self._bar, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl (non-finite values as null), and update TensorBoard and the display."""
        if not self._main:
            return
        self._latest.update(metrics)
        line = {"step": step, **{key: value if math.isfinite(value) else None for key, value in metrics.items()}}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, step)
        if self._live is not None:
            self._live.update(self._render())
        else:
            self.print(f"step {step}/{self._steps}  {self._plain(metrics)}  {self._time_left(step)}")

    def _plain(self, metrics: Mapping[str, float]) -> str:
        return "  ".join(
            f"{key} {form.format(metrics[key])}" for key, form in DISPLAY_FORMATS.items() if key in metrics
        )

    def _time_left(self, step: int) -> str:
        done = step - self._start
        if done <= 0:
            return ""
        seconds = round((time.monotonic() - self._began) / done * (self._steps - step))
        return f"left {seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"

    def _render(self) -> RenderableType:
        table = Table(title=self._title, title_justify="left", box=None, padding=(0, 2), show_header=False)
        shown = [(key, form.format(self._latest[key])) for key, form in DISPLAY_FORMATS.items() if key in self._latest]
        for pair in range(0, len(shown), 2):
            table.add_row(*(cell for entry in shown[pair : pair + 2] for cell in entry))
        return Group(table, self._progress)
