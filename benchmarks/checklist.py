"""Checklist: all checks and benchmarks for a new machine, most valuable first.

python benchmarks/checklist.py OUT [--tiny] [--only NAME|GROUP ...] [--minutes M] [--total-minutes M] [--fresh]

Each check is a command. Its output goes to OUT/NAME.log, its results to OUT/NAME.json where it has any. A check that
fails or is interrupted does not stop the others. OUT/checklist.json is updated after each check. Rerun the same command
to resume: checks that passed are not repeated; checks that failed or were interrupted start from the beginning.
Compiled kernels are cached in the system's temporary folder.

--only takes names and groups; the checks that a check needs (data, train) run before it. Each of groups 1 to 4, in
this order, fits into nine minutes on a machine with one GPU; groups 5 and 6 take longer and can be resumed:
  1  data, train, parity, no-waiting: correctness
  2  step, all: speed
  3  resume, mrr, linear, segmentation: exact resume, and evaluation of a trained model
  4  pipeline, step-vit-l: pipeline tests, speed of ViT-L
  5  tune, step-torch-adamw, default-priority, kernel-by-kernel, colour, step-12x384, step-vit-l-recomputing,
     evaluation: pipeline backend and settings, alternatives, tests
  6  attentive, finetune-encoder, finetune-predictor, finetune-end-to-end, multitask, downstream

Exit code: 0 all passed; 1 a check failed or was interrupted; 3 --total-minutes ended before all checks had run; 128 + N
stopped by signal N.
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
from check_runs import PASSED, RUNNING, CheckResults, check_environ, clear, clear_since, kernel_cache_dir, run_check
from checks import Check, all_needed, checks, in_order, select_checks
from clocks import GpuMonitor, gpu_monitor
from environment import BenchmarkError, check_writable, environment_info
from rich.console import Console

from iwm.evaluation.result_table import ResultTable
from iwm.training.runtime import StopFlag, stop_on_signal
from shards.command_line import run_command

NOT_ALL = 3
"""Exit code where the total time ended before all checks had run."""


@dataclass(frozen=True)
class ChecklistOptions:
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for logs and results."""
    only: tuple[str, ...] = ()
    """Names of checks and groups to run. Default: all."""
    tiny: bool = False
    """Use models, batches and durations that are small enough for a CPU. This tests the commands, not the machine."""
    minutes: float = 9.0
    """Time limit for one check (minutes)."""
    total_minutes: float | None = None
    """Time limit for all checks (minutes). At its end the running check is stopped and no other starts."""
    fresh: bool = False
    """Repeat also the checks that have passed, and the checks that need them."""


def run(options: ChecklistOptions, all_checks: dict[str, Check], console: Console) -> int:
    """Run the chosen checks that have not passed, and return the exit code.

    Raises BenchmarkError for an invalid option, and where another process uses OUT.
    """
    began, out = time.monotonic(), options.out.resolve()
    selected = select_checks(options.only, all_checks)
    names = in_order(selected, all_checks)
    check_writable("OUT", out / "checklist.json")
    with only_one(out), stop_on_signal() as stop, gpu_monitor(out / "gpu.csv") as (watch, no_clocks):
        machine = environment_info()
        outcomes = CheckResults(out / "checklist.json", options.tiny, machine)
        outcomes.resume(options.fresh)
        if options.fresh:
            outcomes.forget(name for name in all_checks if {name, *all_needed(name, all_checks)} & set(selected))
        if machine["commit"] == "unknown" or machine["commit"].endswith("+"):
            say(console, f"commit {machine['commit']}: code changes since the last call cannot be detected")
        if no_clocks:
            say(console, f"clocks and power are not recorded: {no_clocks}")
        call, over = CheckSession(out, all_checks, outcomes, watch, stop, console), False
        for name in names:
            left = float("inf") if options.total_minutes is None else 60 * options.total_minutes
            left -= time.monotonic() - began
            over = over or left <= 0
            if stop or over:
                break
            over = call.make(name, 60 * options.minutes, left)
        show(outcomes, all_checks, out, console)
        endings = [outcomes.checks.get(name, {}).get("ended") for name in names]
    if stop.signal is not None:
        return 128 + stop.signal
    if all(ended == PASSED for ended in endings):
        return 0
    return NOT_ALL if over else 1


@dataclass(frozen=True)
class CheckSession:
    """Checks of one call of the checklist, and the resources that they share."""

    out: Path
    checks: dict[str, Check]
    outcomes: CheckResults
    watch: GpuMonitor
    stop: StopFlag
    console: Console

    def make(self, name: str, limit: float, left: float) -> bool:
        """Run one check unless it has passed, and record it; return True where the total time ended it.

        limit, left: time for this check and remaining time for all (seconds).
        """
        check, before, log = self.checks[name], self.outcomes.checks.get(name), self.out / f"{name}.log"
        if before is not None and before["ended"] == PASSED and all(path.exists() for path in check.makes):
            say(self.console, f"{name}: passed before in {before['seconds']:.0f} s; not repeated")
            return False
        if check.needs is not None and self.outcomes.checks[check.needs]["ended"] != PASSED:
            ended = f"not run: it needs {check.needs}, which has not passed"
            self.outcomes.record(name, {"ended": ended, "seconds": 0.0})
            say(self.console, f"{name}: {ended}")
            return False
        if before is not None and before["ended"] == RUNNING:
            say(self.console, f"{name}: was interrupted before; it starts from the beginning")
            clear_since(kernel_cache_dir(self.out), before["began"])
        clear(check.makes)
        clock, start = time.time(), time.monotonic()
        self.outcomes.record(name, {"ended": RUNNING, "began": clock})
        self.watch.begin(name)
        with self.console.status(name):
            ended = run_check(check.words, log, min(limit, left), self.stop, check_environ(self.out))
        seconds = round(time.monotonic() - start, 1)
        over = ended.startswith("stopped") and not self.stop and left <= limit
        if ended.startswith("stopped"):
            clear_since(kernel_cache_dir(self.out), clock)
            ended += ": time limit --total-minutes reached" if over else ""
        outcome: dict[str, Any] = {"ended": ended, "seconds": seconds, "began": clock, "gpu": self.watch.summary()}
        if name == "train":
            outcome["attention"] = attention(log)
        self.outcomes.record(name, outcome)
        say(self.console, f"{name}: {ended} in {seconds:.0f} s" + ("" if ended == PASSED else f"; see {log}"))
        return over


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Lock the folder. Raises BenchmarkError where another checklist holds the lock."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BenchmarkError(f"{out} is in use by another checklist; wait for it or choose another OUT") from error
        yield


def attention(log: Path) -> str | None:
    """Return the line of a training log that names the attention kernel; None where there is none."""
    _, *lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in lines if "attention" in line), None)


def show(outcomes: CheckResults, all_checks: dict[str, Check], out: Path, console: Console) -> None:
    done = {name: outcomes.checks[name] for name in all_checks if name in outcomes.checks}
    rows = [
        [name, outcome["ended"], f"{outcome.get('seconds', 0):.0f}", f"{name}.log"] for name, outcome in done.items()
    ]
    console.print(ResultTable(str(out), ["check", "ended", "seconds", "log"], rows))


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    options = tyro.cli(ChecklistOptions, description=__doc__, prog="benchmarks/checklist.py")
    return run(options, checks(options.out.resolve(), options.tiny), Console())


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/checklist.py"))
