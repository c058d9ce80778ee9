"""Runs of an ablation study: trained by iwm/train.py and evaluated by iwm/evaluate.py, several in parallel."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from iwm.ablation.evaluations import Evaluation, mrr_on_bank, similarity_of
from iwm.ablation.studies import AblationStudy, Variant
from iwm.evaluation.settings import BankSize
from iwm.report.runs import is_up_to_date
from iwm.training.checkpoint import list_checkpoints
from iwm.training.distributed import cores_per_process
from iwm.training.runtime import StopFlag
from iwm.training.watchdog import WATCHED_PID
from shards.atomic import write_atomically
from shards.errors import UserError

TRAIN, EVALUATE = (str(Path(__file__).resolve().parents[1] / name) for name in ("train.py", "evaluate.py"))
"""Absolute paths of the scripts, independent of the working directory."""

IDENTITY = "study.json"
"""File in the folder of a protocol's training: settings and checkpoint that it belongs to."""


@dataclass(frozen=True)
class PlannedRun:
    """Run to train, with its evaluations."""

    folder: Path
    training: tuple[str, ...]
    """Arguments of iwm/train.py."""
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return self.folder.name


class AblationError(UserError):
    """Failed or stopped run or study; the message names the log or the command to rerun."""


def plan(
    study: AblationStudy,
    seeds: Sequence[int],
    *,
    out: Path,
    training: Callable[[Variant], Sequence[str]],
    common: str,
    bank: BankSize,
    protocols: Sequence[Evaluation] = (),
) -> dict[tuple[Variant, int], PlannedRun]:
    """Return the run of every variant and seed.

    Variants with the same options share a run, which is evaluated on the bank of each of them and on `common`.
    `training` returns a variant's arguments of iwm/train.py without seed and run folder. protocols: further evaluations
    of every run.
    """
    names: dict[tuple[str, ...], str] = {}
    banks: dict[tuple[str, ...], dict[str, Evaluation]] = {}
    common_bank = mrr_on_bank(common, common, None, bank)
    for variant in study.variants:
        if variant.options not in names:
            names[variant.options] = _new_name(f"{variant.row} {variant.column}", names.values())
        own = mrr_on_bank(variant.bank_name, variant.bank, variant.bank_jitter_impl, bank)
        banks.setdefault(variant.options, {common: common_bank})[variant.bank_name] = own
    runs = {}
    for variant in study.variants:
        for seed in seeds:
            folder = out / f"{names[variant.options]}-seed{seed}"
            arguments = (*training(variant), "--train.seed", str(seed), "--run-dir", str(folder))
            evaluations = (
                *(evaluation for _, evaluation in sorted(banks[variant.options].items())),
                similarity_of(common, bank.num_images),
                *protocols,
            )
            runs[variant, seed] = PlannedRun(folder, arguments, evaluations)
    return runs


def _new_name(words: str, taken: Collection[str]) -> str:
    """Return a folder name for `words`, with a number if the name is taken."""
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return next(name for i in count(1) if (name := slug if i == 1 else f"{slug}-{i}") not in taken)


def run_all(
    runs: Sequence[PlannedRun], *, jobs: int, processes: int, log: Callable[[str], None], stop: StopFlag
) -> list[str]:
    """Train and evaluate runs, `jobs` at a time, each with `processes` processes; finished runs are skipped.

    A failed run does not stop the others. Returns one line per failed run, which names its log. The stop flag ends all
    runs; training saves a checkpoint first.
    """
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in _gpu_assignments(jobs, processes):
        slots.put(environment)

    def one(numbered: tuple[int, PlannedRun]) -> str | None:
        number, run = numbered
        if stop:
            return f"{run.name}: not started"
        environment = slots.get()
        try:
            log(f"{number}/{len(runs)} {run.name}: {_train_and_evaluate(run, processes, environment, stop)}")
        except AblationError as error:
            log(f"{number}/{len(runs)} {error}")
            return str(error)
        finally:
            slots.put(environment)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(one, enumerate(runs, start=1)) if failure]


def _gpu_assignments(jobs: int, processes: int) -> list[dict[str, str]]:
    """Return the environment variables of each job: its CUDA_VISIBLE_DEVICES on a machine with GPUs."""
    devices = torch.cuda.device_count()
    if not devices:
        return [{} for _ in range(jobs)]
    shares = [range(first * processes, (first + 1) * processes) for first in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(str(device % devices) for device in share)} for share in shares]


def threads_per_job(jobs: int) -> tuple[str, ...]:
    """Return the options that divide the CPU cores among parallel runs."""
    threads = str(cores_per_process(jobs))
    return ("--train.num-threads", threads, "--data.num-threads", threads) if jobs > 1 else ()


def _train_and_evaluate(run: PlannedRun, processes: int, environment: dict[str, str], stop: StopFlag) -> str:
    """Train and evaluate a run; return a progress message."""
    if is_finished(run):
        return "already finished, skipped"
    run.folder.mkdir(parents=True, exist_ok=True)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    training_seconds = _command(run, (*launch, TRAIN, *run.training), environment, stop)
    evaluation_seconds = 0.0
    for evaluation in run.evaluations:
        if is_done(run, evaluation):
            continue
        files = ("--checkpoint", str(run.folder), "--output", str(result_file(run, evaluation)))
        command = (EVALUATE, evaluation.protocol, *files, *evaluation.options)
        if evaluation.trains:
            _discard_other_training(run, evaluation)
            command = (*launch, *command) if processes > 1 else command
        evaluation_seconds += _command(run, command, environment, stop)
    return f"trained in {training_seconds:.0f} s, evaluated in {evaluation_seconds:.0f} s"


def result_file(run: PlannedRun, evaluation: Evaluation) -> Path:
    """Return the file of an evaluation's result."""
    return run.folder / "eval" / f"{evaluation.output}.json"


def is_finished(run: PlannedRun) -> bool:
    """Return True where all evaluations of a run are up to date."""
    return all(is_done(run, evaluation) for evaluation in run.evaluations)


def is_done(run: PlannedRun, evaluation: Evaluation) -> bool:
    """Return True where an evaluation has a result of the run's newest checkpoint with the expected settings."""
    path = result_file(run, evaluation)
    if not is_up_to_date(path, run.folder):
        return False
    settings = json.loads(path.read_bytes())["settings"]
    return all(settings.get(name) == value for name, value in evaluation.settings.items())


def _discard_other_training(run: PlannedRun, evaluation: Evaluation) -> None:
    """Remove the unfinished training of a protocol that had other settings or another checkpoint, and note these ones.

    A training with the same settings and checkpoint remains, and resumes.
    """
    folder = result_file(run, evaluation).with_suffix("")
    newest = list_checkpoints(run.folder)[0]
    identity = {"checkpoint": f"{newest.name} {newest.stat().st_mtime_ns}", "settings": evaluation.settings}
    content = (json.dumps(identity, indent=1) + "\n").encode()
    note = folder / IDENTITY
    if note.exists() and note.read_bytes() == content:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_atomically(note, content)


def _command(run: PlannedRun, command: tuple[str, ...], environment: dict[str, str], stop: StopFlag) -> float:
    """Run a command with its output in the run's log; return the seconds. Raises AblationError if it fails."""
    start = time.monotonic()
    path = run.folder / "log.txt"
    with open(path, "a") as log:
        log.write(f"$ python {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=log,
            env={**os.environ, WATCHED_PID: str(os.getpid()), **environment},
        )
        terminated = False
        while process.poll() is None:
            if stop and not terminated:
                process.terminate()
                terminated = True
            time.sleep(0.2)
    if stop:
        raise AblationError(f"{run.name}: stopped")
    if process.returncode:
        script = "iwm/train.py" if TRAIN in command else "iwm/evaluate.py"
        raise AblationError(f"{run.name}: {script} failed (exit code {process.returncode}); see {path}")
    return time.monotonic() - start
