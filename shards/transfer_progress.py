"""Progress of copies: a live bar on a terminal, and a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shards.workers import PLAIN_EVERY


class TransferProgress:
    """Display of the bytes that threads have copied. Use it as a context manager; `update` is for one thread."""

    def __init__(self, verb: str, files: int, total: int | None, console: Console) -> None:
        """Set what is displayed. total: bytes to copy; None where it is not known."""
        self.verb, self.files, self.total, self.console = verb, files, total, console
        self.start = self.line = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar = self.progress.add_task(verb, total=total)

    def __enter__(self) -> TransferProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, copied: int, files: int) -> None:
        """Display that so many bytes, and so many whole files, have been copied."""
        text = f"{self.verb} {files:,}/{self.files:,} files"
        self.progress.update(self.bar, completed=copied, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.line > PLAIN_EVERY:
            self.line = now
            of = "" if self.total is None else f" of {self.total / 1e6:,.1f}"
            self.console.print(f"{text}, {copied / 1e6:,.1f}{of} MB, {copied / 1e6 / (now - self.start):,.1f} MB/s")
