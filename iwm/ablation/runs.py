"""The runs of a study: each trained by iwm/train.py and judged by iwm/evaluate.py, several at a time."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from iwm.ablation.studies import Arm, Study
from iwm.evaluation.mrr import BankSettings
from iwm.report.run_folder import is_current
from iwm.training.distributed import cores_each
from iwm.training.signals import StopWish

TRAIN, EVALUATE = (str(Path(__file__).resolve().parents[1] / name) for name in ("train.py", "evaluate.py"))
"""The scripts, wherever a study is run from."""


@dataclass(frozen=True)
class Judge:
    """One evaluation of every run."""

    protocol: str
    output: str
    """Name of its file in RUN/eval."""
    options: tuple[str, ...]
    settings: dict[str, Any]
    """What the file says of its settings when it was made with these options."""


@dataclass(frozen=True)
class Run:
    """One model to train and what judges it."""

    folder: Path
    training: tuple[str, ...]
    """Arguments of iwm/train.py."""
    judges: tuple[Judge, ...]

    @property
    def name(self) -> str:
        return self.folder.name


class AblationError(RuntimeError):
    """A run of a study failed; the message names it and its log."""


def plan(
    study: Study,
    seeds: Sequence[int],
    *,
    out: Path,
    training: Callable[[Arm], Sequence[str]],
    common: str,
    bank: BankSettings,
) -> dict[tuple[Arm, int], Run]:
    """The run of every arm and seed; arms with the same options share theirs, and are judged on each one's bank.

    `training` gives an arm's arguments of iwm/train.py, all but the seed and the folder.
    """
    names: dict[tuple[str, ...], str] = {}
    banks: dict[tuple[str, ...], set[str]] = {}
    for arm in study.arms:
        if arm.options not in names:
            names[arm.options] = _new_name(f"{arm.row} {arm.column}", names.values())
        banks.setdefault(arm.options, {common}).add(arm.bank)
    runs = {}
    for arm in study.arms:
        for seed in seeds:
            folder = out / f"{names[arm.options]}-seed{seed}"
            arguments = (*training(arm), "--train.seed", str(seed), "--run-dir", str(folder))
            judges = (*(_mrr(name, bank) for name in sorted(banks[arm.options])), _similarity(common, bank.images))
            runs[arm, seed] = Run(folder, arguments, judges)
    return runs


def mrr_file(scenario: str) -> str:
    """Name of the MRR file of a bank."""
    return f"mrr-{scenario}"


def _mrr(scenario: str, bank: BankSettings) -> Judge:
    sizes = ("--bank.images", str(bank.images), "--bank.size", str(bank.size), "--bank.chunk", str(bank.chunk))
    settings = {"bank": asdict(replace(bank, scenario=scenario))}
    return Judge("mrr", mrr_file(scenario), ("--bank.scenario", scenario, *sizes), settings)


def _similarity(scenario: str, images: int) -> Judge:
    options = ("--scenario", scenario, "--images", str(images), "--shown", str(min(images, 8)))
    return Judge("similarity", "similarity", options, {"scenario": scenario, "images": images})


def _new_name(words: str, taken: Collection[str]) -> str:
    """Words as a folder's name, numbered where another arm's words come to the same."""
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return next(name for i in count(1) if (name := slug if i == 1 else f"{slug}-{i}") not in taken)


def carry_out(
    runs: Sequence[Run], *, jobs: int, processes: int, say: Callable[[str], None], wish: StopWish
) -> list[str]:
    """Train and judge runs, `jobs` at a time, each with `processes` processes; what was done before is kept.

    A run that fails does not stop the others. Returns a line for each that did, naming its log. A wish to stop ends
    all: training saves first.
    """
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in _environments(jobs, processes):
        slots.put(environment)

    def one(numbered: tuple[int, Run]) -> str | None:
        number, run = numbered
        if wish:
            return f"{run.name}: not begun"
        environment = slots.get()
        try:
            say(f"{number}/{len(runs)} {run.name}: {_train_and_judge(run, processes, environment, wish)}")
        except AblationError as error:
            say(f"{number}/{len(runs)} {error}")
            return str(error)
        finally:
            slots.put(environment)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(one, enumerate(runs, start=1)) if failure]


def _environments(jobs: int, processes: int) -> list[dict[str, str]]:
    """What each place for a run adds to the environment: on a machine with GPUs, which of them are its own."""
    devices = torch.cuda.device_count()
    if not devices:
        return [{} for _ in range(jobs)]
    shares = [range(first * processes, (first + 1) * processes) for first in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(str(device % devices) for device in share)} for share in shares]


def default_threads(jobs: int) -> tuple[str, ...]:
    """Options that keep runs which train side by side from wanting the same cores."""
    each = str(cores_each(jobs))
    return ("--train.threads", each, "--data.threads", each) if jobs > 1 else ()


def _train_and_judge(run: Run, processes: int, environment: dict[str, str], wish: StopWish) -> str:
    """What was done, in words."""
    if all(_is_done(run, judge) for judge in run.judges):
        return "done before, kept"
    run.folder.mkdir(parents=True, exist_ok=True)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    trained = _command(run, (*launch, TRAIN, *run.training), environment, wish)
    judged = 0.0
    for judge in run.judges:
        where = ("--checkpoint", str(run.folder), "--output", str(_file(run, judge)))
        judged += _command(run, (EVALUATE, judge.protocol, *where, *judge.options), environment, wish)
    return f"trained in {trained:.0f} s, judged in {judged:.0f} s"


def _file(run: Run, judge: Judge) -> Path:
    return run.folder / "eval" / f"{judge.output}.json"


def _is_done(run: Run, judge: Judge) -> bool:
    path = _file(run, judge)
    if not is_current(path, run.folder):
        return False
    settings = json.loads(path.read_bytes())["settings"]
    return all(settings[name] == value for name, value in judge.settings.items())


def _command(run: Run, command: tuple[str, ...], environment: dict[str, str], wish: StopWish) -> float:
    """Run a command to its end, its words going to the run's log. Returns the seconds it took."""
    start = time.monotonic()
    path = run.folder / "log.txt"
    with open(path, "a") as log:
        log.write(f"$ python {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env={**os.environ, **environment}
        )
        asked = False
        while process.poll() is None:
            if wish and not asked:
                process.terminate()
                asked = True
            time.sleep(0.2)
    if wish:
        raise AblationError(f"{run.name}: stopped")
    if process.returncode:
        script = "iwm/train.py" if TRAIN in command else "iwm/evaluate.py"
        raise AblationError(f"{run.name}: {script} failed (exit code {process.returncode}); {path} says why")
    return time.monotonic() - start
