"""Display of a run's metrics, which also passes them to the loggers."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from iwm.training.loggers import Logger

DISPLAY_FORMATS = {
    "loss": "{:.4f}",
    "mrr_pooled": "{:.3f}",
    "top1": "{:.1%}",
    "miou": "{:.1%}",
    "images_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
    "data_wait": "{:.1%}",
    "data_wait_max": "{:.1%}",
    "staged": "{:.0%}",
    "rank_ms_max": "{:.1f}",
    "slowest_rank": "{:.0f}",
    "memory_gib": "{:.2f} GiB",
    "gradient_norm": "{:.3f}",
    "lr": "{:.2e}",
    "feature_std": "{:.3f}",
    "rankme": "{:.1f}",
    "skipped": "{:.0f}",
    "checkpoint_pause": "{:.3f} s",
}


def memory_gib(device: torch.device) -> float:
    """Return the peak memory (GiB): of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricLogger:
    """Display of a run's metrics; passes them to its loggers, and closes these. Inactive where `main` is False.

    On a terminal: a live table and a progress bar. Elsewhere: one plain line per measurement.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        start: int,
        *,
        main: bool,
        loggers: Sequence[Logger],
        console: Console | None = None,
    ) -> None:
        self._main = main
        if not main:
            return
        self._console = console or Console()
        self._loggers = loggers
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
        for logger in self._loggers:
            logger.close(failed=value is not None)

    def print(self, text: str) -> None:
        """Print one line of text."""
        if self._main:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def set_step(self, step: int) -> None:
        """Update the progress bar to `step` completed steps."""
        if self._main:
            self._progress.update(self._bar, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the metrics of a step to the loggers and update the display."""
        if not self._main:
            return
        self._latest.update(metrics)
        for logger in self._loggers:
            logger.log(step, metrics)
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
