"""Connection to a Ray cluster: the user's, else one on this machine for the time of the run."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from shards.errors import ShardError, one_line
from shards.workers import available_cores

OBJECT_STORE = 256 * 1024**2
"""Object store of a cluster on this machine (bytes). It holds the samples' names of the shards in flight."""

CONNECT_TIMEOUT = 10.0
"""Time that the head of a cluster may take to accept a connection (seconds). Ray's own limit is two minutes."""


QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment of Ray where the user has not set it: no usage statistics, no warning about GPUs."""


def require_ray() -> None:
    """Raise ShardError where Ray is not installed."""
    if find_spec("ray") is None:
        raise ShardError("--distributor ray needs the package ray: pip install 'iwm[ray]', on every node")


def join_cluster(console: Console) -> bool:
    """Connect this process to a Ray cluster and print which; return False where it was connected before.

    The cluster is that of RAY_ADDRESS, else the one that `ray start` has last started on this machine and that answers,
    else a new one of this machine's cores, which ends with ray.shutdown(). Raise ShardError where RAY_ADDRESS cannot be
    joined.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    joined = not ray.is_initialized()
    if joined:
        address = _address()
        with _kept_signal_handlers():
            if address is None:
                _start(ray)
            else:
                _join(ray, address)
        place = ray.get_runtime_context().gcs_address
        origin = f"cluster at {place}" if address else "no cluster is running, started one on this machine"
    else:
        origin = "the cluster that this process has joined before"
    nodes = sum(node["Alive"] for node in ray.nodes())
    console.print(f"Ray: {origin}: {_count(nodes, 'node')}, {_count(cluster_cpus(), 'CPU')}")
    return joined


def cluster_cpus() -> int:
    """Return how many CPUs the cluster has at present."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _settings() -> dict[str, Any]:
    """Return the settings of ray.init for any cluster: its nodes get this very package, Ray's log stays in files."""
    return {
        "runtime_env": {"py_modules": [str(Path(__file__).parent)]},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }


def _address() -> str | None:
    """Return the address of the cluster to join; `auto` for the one that runs here; None to start one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ShardError(
            f"RAY_ADDRESS={address} is Ray Client's: run this command on a node of the cluster, or with "
            "ray job submit, and unset RAY_ADDRESS"
        )
    if address == "local":
        return None
    if address not in ("", "auto"):
        if not _answers(address):
            raise ShardError(f"no Ray cluster answers at RAY_ADDRESS={address}: correct or unset it, or use ray start")
        return address
    # Ray itself would wait minutes for a cluster that was killed.
    latest = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    if latest.exists() and _answers(latest.read_text().strip()):
        return "auto"
    if address == "auto":
        raise ShardError("RAY_ADDRESS=auto, and no Ray cluster runs on this machine: unset it, or use ray start")
    return None


def _answers(address: str) -> bool:
    try:
        place = urlsplit(f"//{address}")
        with socket.create_connection((place.hostname, place.port or 0), CONNECT_TIMEOUT):
            return True
    except (OSError, ValueError):
        return False


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_settings())
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ShardError(
            f"cannot join the Ray cluster {address} ({one_line(error)}): run this command on one of its nodes, "
            "with its versions of Python and Ray, and its RAY_AUTH_MODE"
        ) from error


def _start(ray: Any) -> None:
    ray.init(
        address="local",
        num_cpus=available_cores(),
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        **_settings(),
    )


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Undo changes of this process's handlers: that of ray.init for SIGTERM waits, then exits without cleaning up."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
