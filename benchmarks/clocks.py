"""Clocks, power and temperature of the GPU during checks, from nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Lock, Thread
from typing import Any

COLUMNS = {
    "timestamp": "timestamp",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "used_percent": "utilization.gpu",
    "memory_mib": "memory.used",
}
"""Columns of gpu.csv after the check's name, and their nvidia-smi fields."""

THROTTLED = "throttled"
"""Last column of gpu.csv, where nvidia-smi has a field for it."""

THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""nvidia-smi fields of the throttle reasons in newer and older drivers."""

SUMMARISED = ("sm_clock_mhz", "power_w", "temperature_c", "used_percent", "memory_mib")

REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of the throttle reasons (nvmlClocksThrottleReasons)."""

EVERY = 3.0
"""Time between two samples (seconds)."""

Sample = dict[str, str]


def query(fields: Sequence[str]) -> tuple[list[str] | None, str]:
    """Query nvidia-smi for fields of the first visible GPU; return their values, or None and the reason."""
    if shutil.which("nvidia-smi") is None:
        return None, "nvidia-smi was not found"
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").partition(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None, "nvidia-smi did not answer within 20 s"
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return None, f"nvidia-smi: {(done.stdout + done.stderr).strip() or f'code {done.returncode}'}"
    return values, ""


class GpuMonitor:
    """Monitor that samples the GPU into a CSV file in a thread while checks run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._columns = dict(COLUMNS)
        self._lock, self._over = Lock(), Event()
        self._check = ""
        self._samples: list[Sample] = []

    def start(self) -> str:
        """Take the first sample; return the reason where nvidia-smi has none, else an empty string."""
        for field in THROTTLE_FIELDS:
            if query([field])[0] is not None:
                self._columns[THROTTLED] = field
                break
        return self.sample()

    def begin(self, check: str) -> None:
        """Attribute the samples from now on to this check."""
        with self._lock:
            self._check, self._samples = check, []

    def summary(self) -> dict[str, Any] | None:
        """Summarise the samples since `begin`; None where there are none."""
        with self._lock:
            return summarised(self._samples)

    def sample(self) -> str:
        """Take one sample and write its line; return the reason where there is none, else an empty string."""
        values, reason = query(list(self._columns.values()))
        if values is None:
            return reason
        with self._lock:
            self._samples.append(dict(zip(self._columns, values, strict=True)))
            line = ",".join([self._check, *values])
        with open(self._file, "a") as file:
            if file.tell() == 0:
                print("check", *self._columns, sep=",", file=file)
            print(line, file=file)
        return ""

    def run(self) -> None:
        """Sample until `stop` is called. A failed sample leaves a gap in the file."""
        while not self._over.wait(EVERY):
            self.sample()

    def stop(self) -> None:
        self._over.set()


@contextmanager
def gpu_monitor(file: Path) -> Iterator[tuple[GpuMonitor, str]]:
    """Sample the GPU inside the context; yield the monitor and the reason why there are no samples, else ''."""
    watch = GpuMonitor(file)
    reason = watch.start()
    thread = Thread(target=watch.run, daemon=True)
    if not reason:
        thread.start()
    try:
        yield watch, reason
    finally:
        watch.stop()
        if not reason:
            thread.join()


def summarised(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Return the minimum, median and maximum of each column, and the number of samples with each throttle reason."""
    if not samples:
        return None
    found: dict[str, Any] = {"samples": len(samples)}
    for column in SUMMARISED:
        values = [number for sample in samples if (number := _number(sample[column])) is not None]
        found[column] = {"min": min(values), "median": median(values), "max": max(values)} if values else None
    seen = Counter(reason for sample in samples for reason in _reasons(sample.get(THROTTLED, "")))
    return found | {THROTTLED: dict(seen)}


def _number(text: str) -> float | None:
    """Parse a number; return None for values that nvidia-smi does not know, such as '[N/A]'."""
    try:
        return float(text)
    except ValueError:
        return None


def _reasons(text: str) -> list[str]:
    """Return the throttle reasons of a mask such as '0x0000000000000004'; an empty list for an unknown value."""
    try:
        mask = int(text, 16)
    except ValueError:
        return []
    return [name for bit, name in REASONS.items() if mask & bit]
