"""Watchdog of a training process: it ends with its launcher, and never waits for a process that is gone.

A thread looks once a second. Where the launcher (torchrun, srun) is gone, it stops the run as SIGTERM does: after the
current step, with a checkpoint. Where a process was told to end and makes no progress, because others are gone and a
collective waits for them, it ends the process. Where a process makes no progress for long, it finds the one that all
wait for (heartbeats.py), prints one line that names it, and ends the run.

This module imports no torch: the launcher is watched while torch is imported.
"""

from __future__ import annotations

import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import TYPE_CHECKING

from iwm.training.rank_progress import GRACE, Phase, RankProgress
from shards.errors import UserError, one_line

if TYPE_CHECKING:
    from iwm.training.heartbeats import Heartbeats, Peer

PARENT = os.getppid()
"""Process id of the parent when this module was imported, the first thing that a training command does."""

WATCHED_PID = "IWM_WATCHED_PID"
"""Environment variable: id of a further process with which training ends, for programs that start launchers."""

INTERVAL = 0.5
"""Time between two looks (seconds)."""
LOST_AFTER = 60.0
"""Longest time (seconds) without a heartbeat of a process that others wait for; less with a shorter collective_timeout.
Heartbeats come from a thread, also while the process computes, compiles, reads or writes."""
BROKEN = 2.5
"""Time (seconds) without a heartbeat after which a process is the one to which a connection broke."""
LEAVING = 3.0
"""Time (seconds) in which a process that found a loss must have left what remains of the process group."""
SHARE_OF_TIMEOUT = 0.9
"""Share of collective_timeout after which a waiting process speaks, before its collective fails."""
LONGEST_WRITE = 600.0
"""Time (seconds) after which a process that must end no longer waits for its checkpoint to be written."""

RERUN = "rerun the same command to resume from the newest checkpoint"
LAUNCHER_GONE = "the launcher (torchrun, srun) of a process of this run is gone"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class LostRankError(UserError):
    """Loss of another process of the run, or of a launcher; the message names it."""


class Watchdog:
    """Watchdog of this process, active in its context.

    Without a launcher it is inactive: `nohup python iwm/train.py &` outlives its shell. With several processes it is
    completed by `join`.
    """

    def __init__(self, collective_timeout: float) -> None:
        """Store the time (seconds) after which a collective fails."""
        self.progress = RankProgress()
        self._timeout = collective_timeout
        self._lost_after = min(LOST_AFTER, SHARE_OF_TIMEOUT * collective_timeout)
        self._launchers = _launchers()
        self._heartbeats: Heartbeats | None = None
        self._signalled = self._closed = self._searching = False
        self._speaks = True
        self._looked = time.monotonic()
        self._deadline: float | None = None
        self._last_words = ""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._launchers:
            self._start()
        return self

    def _start(self) -> None:
        """Start the thread. Signals reach it through a pipe, also while the main thread waits in a collective."""
        self._signals, self._wakeup = os.pipe()
        for end in (self._signals, self._wakeup):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The command reports the exception from here on. A deadline holds until the process has ended.
        self._last_words = ""
        if self._heartbeats is not None:
            self._heartbeats.close()
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        if self._deadline is None:
            self._closed = True
            self._thread.join(3)

    def join(self, heartbeats: Heartbeats, local_rank: int) -> None:
        """Exchange heartbeats with the other processes from here on. They must be made with `progress`."""
        self._heartbeats, self._speaks = heartbeats, local_rank == 0
        if self._thread is None:
            self._start()

    def leave(self) -> None:
        """Stop the heartbeats. Call it before `DistEnv.wait_for_all`: under srun their store ends with rank 0."""
        self.progress.enter(Phase.ENDING)
        if self._heartbeats is not None:
            self._heartbeats.close()

    @contextmanager
    def explaining_losses(self) -> Iterator[None]:
        """Raise LostRankError in place of a collective's error where another process is gone; use around all training.

        Other errors pass unchanged, and the other processes are told. Also raises LostRankError at the end where a
        launcher is gone: torchrun would wait five minutes for one on another machine if its own processes succeeded.
        """
        try:
            yield
            self.progress.enter(Phase.ENDING)
        except BaseException as error:
            reason = self._loss_behind(error)
            self.progress.enter(Phase.ENDING)
            if reason is None:
                self._tell(error)
                raise
            self._fail(f"{reason}; {RERUN} ({_brief(error)})", error)
        if self.progress.launcher_lost:
            self._fail(f"{LAUNCHER_GONE}; training stopped after step {self.progress.step or 0:,}; {RERUN}")

    def _fail(self, message: str, cause: BaseException | None = None) -> None:
        """Raise LostRankError on the process that found the loss and on one per machine, else SystemExit.

        What is left of the process group may never answer: the watchdog ends the process if leaving it takes long.
        """
        self._last_words = message if self._speaks else ""
        self._deadline = time.monotonic() + LEAVING
        if not self._speaks:
            raise SystemExit(1) from cause
        raise LostRankError(message) from cause

    def _loss_behind(self, error: BaseException) -> str | None:
        """Return which loss of another process explains an error; None for an error of another kind.

        Takes up to 2 · GRACE seconds, because silence takes time.
        """
        if self._heartbeats is None or not _is_of_a_collective(error):
            return None
        beats, until = self._heartbeats, time.monotonic() + 2 * GRACE
        self._searching = True
        beats.look()
        while time.monotonic() < until:
            if beats.notice is not None:
                return beats.notice
            if silent := beats.silent(BROKEN):
                reason = _lost(silent)
                self._speaks = beats.announce(reason) or self._speaks
                return reason
            if beats.failed or self.progress.launcher_lost:
                return LAUNCHER_GONE
            time.sleep(0.1)
        self._searching = False
        return None

    def _tell(self, error: BaseException) -> None:
        """Tell the other processes that this one ends by an error."""
        if self._heartbeats is not None:
            name = f"rank {self._heartbeats.rank} on host {self._heartbeats.host}"
            self._heartbeats.announce(f"{name} ended with {type(error).__name__}: {_brief(error)}")

    def _run(self) -> None:
        while not self._closed:
            select.select([self._signals], [], [], INTERVAL)
            with suppress(BlockingIOError):
                received = os.read(self._signals, 64)
                self._signalled = self._signalled or any(number in STOP_SIGNALS for number in received)
            if self._deadline is not None:
                if time.monotonic() > self._deadline:
                    _print_error(self._last_words)
                    os._exit(1)
            elif not self._searching and (reason := self._reason_to_end()) is not None and not self._closed:
                self._end(reason)

    def _reason_to_end(self) -> str | None:
        """Return why this process must end at once; None where it need not."""
        now, progress, beats = time.monotonic(), self.progress, self._heartbeats
        if now - self._looked > 20 * INTERVAL:
            # This process was suspended, perhaps with all others (scontrol suspend): nobody is late.
            progress.since = now
            if beats is not None:
                beats.reading = False
        self._looked = now
        self._watch_launchers()
        idle = now - progress.since
        if progress.is_writing and idle < LONGEST_WRITE:
            return None
        if beats is not None:
            beats.reading = idle > 2
        if progress.launcher_lost and idle > progress.patience:
            return f"{LAUNCHER_GONE}; this process made no progress for {idle:.0f} s"
        if beats is None or progress.phase is Phase.ENDING:
            return None
        return self._loss(beats, idle)

    def _loss(self, beats: Heartbeats, idle: float) -> str | None:
        """Return which process all others wait for, where this run cannot go on. idle: seconds without progress."""
        progress = self.progress
        if beats.notice is not None:
            return beats.notice if idle > GRACE else None
        if self._signalled and progress.step is None and idle > GRACE:
            return "a signal ended the run before its first step"
        told = self._signalled and idle > progress.patience
        silent = beats.silent(GRACE - 1 if told else self._lost_after / 2)
        if silent and (told or idle > self._lost_after):
            return _lost(silent)
        if progress.phase in (Phase.WAITING, Phase.TRAINING) and idle > SHARE_OF_TIMEOUT * self._timeout:
            return _hang(beats.hindmost(), beats.size, idle)
        return None

    def _watch_launchers(self) -> None:
        """Stop the run as SIGTERM does where a launcher is gone, or the store with all processes' addresses."""
        beats = self._heartbeats
        gone = any(launcher.is_gone() for launcher in self._launchers)
        if beats is not None and self.progress.phase is not Phase.ENDING:
            gone = gone or beats.failed or time.monotonic() - beats.answered > self._lost_after
        if gone and not self.progress.launcher_lost:
            self.progress.launcher_lost = True
            _discard_output_without_reader()
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, reason: str) -> None:
        """Print the reason, if this process is the first to know, tell the others, and end this process."""
        first = self._heartbeats is None or self._heartbeats.failed or self._heartbeats.announce(reason)
        if first or self._speaks:
            _print_error(f"{reason}; the run ends: {RERUN}")
        os._exit(1)


def _print_error(message: str) -> None:
    """Print a line on stderr without Python's buffer, which the main thread may hold; nothing for an empty one."""
    if message:
        with suppress(OSError):
            os.write(2, f"iwm: {message}\n".encode())


class Launcher:
    """Process with which this one ends."""

    def __init__(self, pid: int, is_parent: bool) -> None:
        self.pid, self._is_parent = pid, is_parent
        self._started = None if is_parent else _start_time(pid)
        # The first process of a machine or container adopts those whose launcher ended while they started.
        self._adopted = is_parent and pid == 1 and "TORCHELASTIC_RUN_ID" in os.environ and not _is_python(1)

    def is_gone(self) -> bool:
        if self._is_parent:
            return os.getppid() != self.pid or self._adopted
        return self._started is None or _start_time(self.pid) != self._started


def _launchers() -> list[Launcher]:
    """Return the processes with which this one must end: the parent, if it is a launcher, and that of WATCHED_PID."""
    found = [Launcher(int(os.environ[WATCHED_PID]), is_parent=False)] if WATCHED_PID in os.environ else []
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ:
        found.append(Launcher(PARENT, is_parent=True))
    return found


def _is_python(pid: int) -> bool:
    """Return True where a process runs this Python, as torchrun does, also as the first process of a container."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:
        return False


def _start_time(pid: int) -> str | None:
    """Return when a process was started, in the kernel's form, None where it does not run: ids are used again."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _discard_output_without_reader() -> None:
    """Discard output whose reader ended with the launcher: writing a line must not fail before the checkpoint."""
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream)


def _is_of_a_collective(error: BaseException) -> bool:
    """Return True for errors that torch raises where a connection to another process fails."""
    import torch.distributed  # not at the top: see the module's docstring

    # gloo's errors have no class of their own, but begin with the place in gloo's source.
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _brief(error: BaseException) -> str:
    """Return the beginning of an error's message, without the place in gloo's source."""
    return shorten(re.sub(r"^\[\S+\] ", "", one_line(error)), 100, placeholder=" …")


def _lost(silent: list[Peer]) -> str:
    """Return a sentence on processes without heartbeats."""
    quiet = time.monotonic() - min(peer.changed for peer in silent)
    names = ", ".join(f"{peer.name} ({peer.place})" for peer in silent)
    return f"{names} was lost: no sign of life for {quiet:.0f} s or more"


def _hang(hindmost: list[Peer], size: int, idle: float) -> str:
    """Return a sentence on the processes that the others wait for, which have heartbeats but no progress."""
    if len(hindmost) in (0, size):
        step = f"{(hindmost[0].step or 0) + 1:,}" if hindmost else "the same"
        return f"all ranks wait in step {step} for {idle:.0f} s: a collective does not end (network or GPU)"
    names = ", ".join(f"{peer.name} ({peer.place})" for peer in hindmost)
    return f"{names} stopped answering: the other ranks wait for it for {idle:.0f} s"
