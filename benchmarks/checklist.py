"""Everything to look at on a new machine, most valuable first.

python benchmarks/checklist.py OUT [--tiny] [--only NAME|GROUP ...] [--minutes M] [--total-minutes M] [--fresh]

Each check is a command; its output goes to OUT/NAME.log, its figures to OUT/NAME.json where it has any. A check that
fails or is cut off does not stop the others. OUT/checklist.json is renewed after each. Given again with the same OUT,
the checklist goes on: checks that passed are not repeated; those that failed or were cut off start afresh. Compiled
kernels are kept in the system's temporary folder.

--only takes names and groups; what a check needs (data, train) is made before it. Groups 1 to 4, in this order, are
meant for one call of nine minutes each on a machine with one GPU; 5 and 6 are what is left and take several:
  1  data, train, parity, no-waiting: does it run, is it right
  2  step, all: how fast
  3  resume, mrr, linear, segmentation: exact resume, and what builds on a trained model
  4  pipeline, step-vit-l, tune
  5  step-torch-adamw, default-priority, kernel-by-kernel, colour, step-12x384, step-vit-l-recomputing,
     evaluation
  6  attentive, finetune-encoder, finetune-predictor, finetune-end-to-end, multitask, downstream

Exit code: 0 all passed; 1 a check failed or was cut off; 3 --total-minutes were over before all were made; 128 + N
ended by signal N.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from attempt import PASSED, attempt, clear, clear_since, environment, kernels
from checks import Check, all_needed, asked, checks, in_order
from clocks import Clocks, clocks
from machine import machine
from mistakes import BenchmarkError, make_room_for
from outcomes import RUNNING, Outcomes
from rich.console import Console
from rich.table import Table

from iwm.training.signals import StopWish, stop_on_signal

NOT_ALL = 3
"""Exit code where time was over before all checks were made."""


@dataclass(frozen=True)
class Options:
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for logs and figures."""
    only: tuple[str, ...] = ()
    """Checks and groups to make; none named: all."""
    tiny: bool = False
    """Models, batches and durations so small that a CPU gets through: to try the commands, not the machine."""
    minutes: float = 9.0
    """Most time for one check."""
    total_minutes: float | None = None
    """Most time for all of them: no check starts, and the running one is stopped, when it is over."""
    fresh: bool = False
    """Repeat checks that passed, too, and those that need them."""


def run(options: Options, all_checks: dict[str, Check], console: Console) -> int:
    """Make the chosen checks that have not passed; the exit code.

    Raises BenchmarkError for an option that makes no sense, and where another process uses OUT.
    """
    began, out = time.monotonic(), options.out.resolve()
    wanted = asked(options.only, all_checks)
    names = in_order(wanted, all_checks)
    make_room_for("OUT", out / "checklist.json")
    with only_one(out), stop_on_signal() as wish, clocks(out / "gpu.csv") as (watch, no_clocks):
        here = machine()
        outcomes = Outcomes(out / "checklist.json", options.tiny, here)
        outcomes.resume(options.fresh)
        if options.fresh:
            outcomes.forget(name for name in all_checks if {name, *all_needed(name, all_checks)} & set(wanted))
        if here["commit"] == "unknown" or here["commit"].endswith("+"):
            say(console, f"commit {here['commit']}: changes of the code since the last call are not noticed")
        if no_clocks:
            say(console, f"no clocks and power are recorded: {no_clocks}")
        call, over = Call(out, all_checks, outcomes, watch, wish, console), False
        for name in names:
            left = float("inf") if options.total_minutes is None else 60 * options.total_minutes
            left -= time.monotonic() - began
            over = over or left <= 0
            if wish or over:
                break
            over = call.make(name, 60 * options.minutes, left)
        show(outcomes, all_checks, out, console)
        endings = [outcomes.checks.get(name, {}).get("ended") for name in names]
    if wish.signal is not None:
        return 128 + wish.signal
    if all(ended == PASSED for ended in endings):
        return 0
    return NOT_ALL if over else 1


@dataclass(frozen=True)
class Call:
    """One call of the checklist: its checks, and what each of them is made with."""

    out: Path
    checks: dict[str, Check]
    outcomes: Outcomes
    watch: Clocks
    wish: StopWish
    console: Console

    def make(self, name: str, limit: float, left: float) -> bool:
        """Make one check unless it has passed, and record it; whether the time for all checks ended it.

        limit, left: seconds for this check and for all.
        """
        check, before, log = self.checks[name], self.outcomes.checks.get(name), self.out / f"{name}.log"
        if before is not None and before["ended"] == PASSED and all(path.exists() for path in check.makes):
            say(self.console, f"{name}: passed before, in {before['seconds']:.0f} s; not repeated")
            return False
        if check.needs is not None and self.outcomes.checks[check.needs]["ended"] != PASSED:
            ended = f"not made: it needs {check.needs}, which has not passed"
            self.outcomes.record(name, {"ended": ended, "seconds": 0.0})
            say(self.console, f"{name}: {ended}")
            return False
        if before is not None and before["ended"] == RUNNING:
            say(self.console, f"{name}: was cut off before; it starts afresh")
            clear_since(kernels(self.out), before["began"])
        clear(check.makes)
        clock, start = time.time(), time.monotonic()
        self.outcomes.record(name, {"ended": RUNNING, "began": clock})
        self.watch.begin(name)
        with self.console.status(name):
            ended = attempt(check.words, log, min(limit, left), self.wish, environment(self.out))
        seconds = round(time.monotonic() - start, 1)
        over = ended.startswith("stopped") and not self.wish and left <= limit
        if ended.startswith("stopped"):
            clear_since(kernels(self.out), clock)
            ended += ": --total-minutes were over" if over else ""
        outcome: dict[str, Any] = {"ended": ended, "seconds": seconds, "began": clock, "gpu": self.watch.summary()}
        if name == "train":
            outcome["attention"] = attention(log)
        self.outcomes.record(name, outcome)
        say(self.console, f"{name}: {ended} in {seconds:.0f} s" + ("" if ended == PASSED else f"; see {log}"))
        return over


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold the folder. Raises BenchmarkError where another checklist holds it."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BenchmarkError(f"{out} is in use by another checklist; wait for it or name another OUT") from error
        yield


def attention(log: Path) -> str | None:
    """The line of a training's opening that names the attention kernel; None where there is none."""
    _, *lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in lines if "attention" in line), None)


def show(outcomes: Outcomes, all_checks: dict[str, Check], out: Path, console: Console) -> None:
    table = Table("check", "ended", "seconds", "log", title=str(out))
    for name in [name for name in all_checks if name in outcomes.checks]:
        outcome = outcomes.checks[name]
        table.add_row(name, outcome["ended"], f"{outcome.get('seconds', 0):.0f}", f"{name}.log")
    console.print(table)


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    options = tyro.cli(Options, description=__doc__, prog="benchmarks/checklist.py")
    try:
        return run(options, checks(options.out.resolve(), options.tiny), Console())
    except BenchmarkError as error:
        print(f"benchmarks/checklist.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
