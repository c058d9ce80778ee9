"""Importing dali_pipelines sets environment variables that the user has not set."""

import os
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "CUDA_DEVICE_MAX_CONNECTIONS")
SHOW = f"import os, dali_pipelines; print([os.environ.get(name) for name in {NAMES}])"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["1000", None, "32"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, [None, "PASSIVE", "32"]),
        ({"GOMP_SPINCOUNT": "7", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["7", None, "1"]),
    ],
    ids=["nothing", "OMP_WAIT_POLICY", "both"],
)
def test_a_users_values_are_kept(given: dict[str, str], expected: list[str | None]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment | given, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr
