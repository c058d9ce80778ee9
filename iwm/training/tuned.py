"""The pipeline's settings that suit a machine: `benchmarks/throughput.py tune` writes them, training reads them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from iwm.config import Config, ConfigError
from shards.pool import available_cores

SETTINGS: dict[str, type] = {
    "threads": int,
    "prefetch": int,
    "hw_decoder_load": float,
    "decoder_width_hint": int,
    "decoder_height_hint": int,
}
"""Fields of `data` (iwm/config.py) that a tuned file may set: they change the speed and nothing else."""

REMEDY = "write it anew with 'python benchmarks/throughput.py tune --out FILE'"


@dataclass(frozen=True)
class Machine:
    """What the settings depend on."""

    processor: str
    cores: int
    """That this process may use."""
    gpu: str | None
    """None: the pipeline works on the CPU."""
    processes: int
    """That share the cores."""


@dataclass(frozen=True)
class Tuned:
    """A tuned file's content."""

    path: Path
    data: Mapping[str, int | float]
    """By the names of SETTINGS; not all need be there."""
    made_on: Machine

    def over(self, config: Config) -> Config:
        """The configuration with these settings in place of its own."""
        changed: dict[str, Any] = dict(self.data)
        return replace(config, data=replace(config.data, **changed))

    def remarks(self, here: Machine) -> list[str]:
        """A line for the run's opening, and one more where the file was made on another kind of machine."""
        settings = ", ".join(f"data.{name} {value}" for name, value in self.data.items())
        then, now = asdict(self.made_on), asdict(here)
        others = [f"{name} {then[name]} (here {now[name]})" for name in then if then[name] != now[name]]
        made_elsewhere = f"{self.path} was made on another machine: {', '.join(others)}; it may be slow here: {REMEDY}"
        return [f"tuned by {self.path}: {settings}", *([made_elsewhere] if others else [])]


def this_machine(device: torch.device, processes: int) -> Machine:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(processor(), available_cores(), gpu, processes)


def processor() -> str:
    """The processor's name, as the system gives it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_tuned(tuned: Tuned) -> None:
    """To `tuned.path`. Raises OSError."""
    content = {"data": dict(tuned.data), "made_on": asdict(tuned.made_on)}
    heading = "# Written by benchmarks/throughput.py tune; read by iwm/train.py RECIPE --tuned FILE.\n"
    tuned.path.write_text(heading + yaml.safe_dump(content, sort_keys=False))


def read_tuned(path: Path) -> Tuned:
    """Raises ConfigError where the file is missing, no YAML, or has keys or types that do not belong there."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--tuned {path}: it cannot be read: {error.strerror}; {REMEDY}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        first, *_ = str(error).splitlines()
        raise ConfigError(f"--tuned {path}: it is no YAML ({first}); {REMEDY}") from error
    top = _checked(path, "", content, {"data": dict, "made_on": dict})
    data = _checked(path, "data.", top.get("data", {}), SETTINGS)
    kinds = {"processor": str, "cores": int, "gpu": str, "processes": int}
    made_on = _checked(path, "made_on.", top.get("made_on", {}), kinds, optional="gpu")
    missing = [field.name for field in fields(Machine) if field.name not in made_on]
    if missing or not data:
        lacking = "data" if not data else f"made_on.{missing[0]}"
        raise ConfigError(f"--tuned {path}: {lacking} is missing; {REMEDY}")
    return Tuned(path, data, Machine(**made_on))


def _checked(path: Path, prefix: str, values: Any, kinds: Mapping[str, type], optional: str = "") -> dict[str, Any]:
    """`values`, if it is a mapping with keys and types of `kinds`; `optional` names the key that may be None."""
    if not isinstance(values, dict):
        what = prefix.rstrip(".") or "the file"
        raise ConfigError(f"--tuned {path}: {what} is no mapping of names to values; {REMEDY}")
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"--tuned {path}: {prefix}{name} is unknown; there are {', '.join(kinds)}; {REMEDY}")
        accepted = (int, float) if kinds[name] is float else kinds[name]
        fits = isinstance(value, accepted) and not isinstance(value, bool)
        if not fits and not (value is None and name == optional):
            wanted = kinds[name].__name__
            raise ConfigError(f"--tuned {path}: {prefix}{name} {value!r} must be of type {wanted}; {REMEDY}")
    return values
