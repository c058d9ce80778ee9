"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

from tests.training.runs import ROOT

STEPS = """
import resource, sys
import torch
from iwm.training.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not glibc")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(2**20) for _ in range(4)]
for _ in range(20):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def test_kept_memory_is_not_asked_of_the_system_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", STEPS, how], cwd=ROOT, text=True, capture_output=True, check=False)
        if done.stderr.strip() == "not glibc":
            pytest.skip("the C library here is not glibc, whose malloc this is about")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # Ten times sixteen MiB, in pages of 4 KiB; what is kept may still settle into other places now and then.
    given_back = faults("give back")
    assert given_back > 10_000
    assert faults("keep") < given_back / 10
