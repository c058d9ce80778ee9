"""Test of exact resume after kill -9, and that a killed job leaves no process running.

Trains into OUT/whole without interruption, and into OUT/cut with kills; then compares the last checkpoints. Fails where
they are not bit-identical, with the size of the difference, where the run ended before a kill, or where a process of
the job was left LIMIT seconds after a kill. Runs in deterministic mode (--train.deterministic) should be identical;
without it the order of a GPU's sums varies.

By default one process is killed once, soon after its first checkpoint. With --nodes, so many torchrun agents train with
--workers processes each, and at random moments an agent, a worker or a whole node (agent and workers) is killed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from kill_job import KillJob

from iwm.training import checkpoint as checkpoints
from shards.command_line import run_command
from shards.errors import UserError

LIMIT = 10.0
"""Time (seconds) after which no process of a killed job may be left."""

VICTIMS = ("agent", "worker", "node")


class KillError(UserError):
    """Job that fails, or that cannot be killed as planned."""


class Kill(NamedTuple):
    """One kill and what became of the job."""

    victim: str
    moment: float
    """Time (seconds) since the start of the job."""
    step: int
    """Step of the last line of metrics before the kill; 0 without one."""
    left: list[str]
    """Processes left after LIMIT seconds."""
    seconds: float | None
    """Time until the last process had ended; None if it did not within six times LIMIT."""

    @property
    def row(self) -> str:
        seconds = "not ended" if self.seconds is None else f"{self.seconds:.1f}"
        row = f"{self.victim:<10}{self.moment:>10.1f}{self.step:>8}{len(self.left):>8}{seconds:>12}"
        return "  ".join([row, *self.left])


HEADER = f"{'kill':<6}{'victim':<10}{'after s':>10}{'step':>8}{'left':>8}{'ended in s':>12}"


def newest_step(run: Path) -> int:
    """Return the number of the last whole line of metrics.jsonl, as a step; 0 without one."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def run_to_end(words: list[str], nodes: int, workers: int, log: Path) -> tuple[float, float, float]:
    """Train to the end; return the seconds until the processes are connected, until the first metrics, and in total.

    Raises KillError where training fails.
    """
    run, began = Path(words[words.index("--run-dir") + 1]), time.monotonic()
    connected = first = 0.0
    with open(log, "a") as file:
        job = KillJob(words, nodes, workers, file)
        while any(agent.poll() is None for agent in job.agents):
            connected = connected or (time.monotonic() - began if job.holds(run / ".lock") else 0.0)
            first = first or (time.monotonic() - began if newest_step(run) else 0.0)
            time.sleep(0.05)
    if any(agent.returncode for agent in job.agents):
        raise KillError(f"training failed; see {log}")
    return connected, first, time.monotonic() - began


def kill_at_random(
    words: list[str], nodes: int, workers: int, log: Path, latest: float, victim: str, rng: random.Random
) -> Kill:
    """Start the job, kill the victim within `latest` seconds after its processes are connected, and wait for the rest.

    Before that moment nothing of a job on several machines knows that a part of it has ended; torchrun and
    train.collective_timeout limit the wait. Raises KillError if the job ended before.
    """
    run, began, until = Path(words[words.index("--run-dir") + 1]), time.monotonic(), None
    with open(log, "a") as file:
        job = KillJob(words, nodes, workers, file)
        try:
            while until is None or time.monotonic() < until:
                if all(agent.poll() is not None for agent in job.agents):
                    raise KillError(f"the job ended before it could be killed; give it more steps, or see {log}")
                if until is None and job.holds(run / ".lock"):
                    until = time.monotonic() + rng.uniform(0, latest)
                time.sleep(0.02)
            moment, step = time.monotonic() - began, newest_step(run)
            job.kill(victim, rng.randrange(nodes))
            seconds = job.seconds_until_gone(LIMIT)
            left = job.names()
            if seconds is None:
                later = job.seconds_until_gone(5 * LIMIT)
                seconds = None if later is None else LIMIT + later
            return Kill(victim, moment, step, left, seconds)
        finally:
            job.end()


def kill_after_checkpoint(words: list[str], log: Path) -> None:
    """Start a process and kill it soon after its first checkpoint. Raises KillError if it ended before.

    The delay after the checkpoint is at most the time from the first line of metrics to the first checkpoint.
    """
    run = Path(words[words.index("--run-dir") + 1])
    with open(log, "a") as file:
        job = KillJob(words, 0, 1, file)
        process = job.agents[0]
        _wait(process, (run / "metrics.jsonl").exists)
        logged = time.monotonic()
        _wait(process, lambda: bool(checkpoints.list_checkpoints(run)))
        time.sleep(random.uniform(0, time.monotonic() - logged))
        over = process.poll() is not None
        job.end()
    if over:
        raise KillError(
            f"{run} ended before it could be killed; give it more steps after its first checkpoint "
            f"(--schedule.steps, --log.checkpoint-interval), or see {log}"
        )
    print(f"killed with {checkpoints.list_checkpoints(run)[0].name} as its newest checkpoint")


def _wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    while not until() and process.poll() is None:
        time.sleep(0.01)


def compare(whole: Path, cut: Path) -> bool:
    """Compare the newest checkpoints of two runs; print and return whether they are the same."""
    one, other = (checkpoints.load_newest(run) for run in (whole, cut))
    assert one is not None
    assert other is not None
    apart = {
        name: ((value.double() - other.model[name].double()).norm() / value.double().norm()).item()
        for name, value in one.model.items()
        if not torch.equal(value, other.model[name])
    }
    if not apart and one.step == other.step:
        print(f"step {other.step}: {len(one.model)} tensors bit for bit the same")
        return True
    worst = max(apart, key=lambda name: apart[name], default="none")
    print(f"{len(apart)} of {len(one.model)} tensors differ, {worst} most: {apart.get(worst, 0):.2e} of its norm")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        "benchmarks/kill_and_compare.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="All other options are those of iwm/train.py.",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for both runs and their logs")
    parser.add_argument("recipe", metavar="RECIPE", help="recipe of iwm/train.py")
    parser.add_argument("--kills", type=int, default=1, help="number of kills (default: 1)")
    parser.add_argument("--nodes", type=int, default=0, help="torchrun agents (default: 0, one plain process)")
    parser.add_argument("--workers", type=int, default=1, help="training processes of each agent (default: 1)")
    parser.add_argument("--kill-seed", type=int, default=0, help="seed of the random moments and nodes (default: 0)")
    given, training = parser.parse_known_args()
    out, nodes = given.out, given.nodes
    if out.exists():
        raise KillError(f"{out} already exists; choose another folder")
    out.mkdir(parents=True)
    whole, cut = ([given.recipe, *training, "--run-dir", str(out / name)] for name in ("whole", "cut"))
    log, rng, killed = out / "cut.log", random.Random(given.kill_seed), list[Kill]()
    connected, first, total = run_to_end(whole, nodes, given.workers, out / "whole.log")
    if nodes:
        latest = first - connected + (total - first) / max(1, given.kills)
        print(
            f"{nodes} agents × {given.workers} workers; connected after {connected:.1f} s, first metrics after "
            f"{first:.1f} s, end after {total:.1f} s"
        )
        print(HEADER, flush=True)
        for number in range(1, given.kills + 1):
            victim = VICTIMS[(number - 1) % len(VICTIMS)]
            killed.append(kill_at_random(cut, nodes, given.workers, log, latest, victim, rng))
            print(f"{number:<6}{killed[-1].row}", flush=True)
    else:
        for _ in range(given.kills):
            kill_after_checkpoint(cut, log)
    run_to_end(cut, nodes, given.workers, log)
    same, left = compare(out / "whole", out / "cut"), sum(len(kill.left) for kill in killed)
    if nodes:
        print(f"{len(killed)} kills, {left} processes left {LIMIT:.0f} s after them")
    return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/kill_and_compare.py"))
