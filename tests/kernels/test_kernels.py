"""Triton kernels of the project: compiled on a GPU, interpreted elsewhere."""

import sys

from tests.training.runs import finish


def test_the_kernels_and_their_gradients_are_those_of_fp32() -> None:
    """Run in a separate process, because Triton decides at a kernel's definition whether to interpret it."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=-ra --strict-markers"]
    cases = ["tests/kernels/short_attention_cases.py", "tests/kernels/mlp_cases.py"]
    finish([sys.executable, "-m", "pytest", *options, *cases])
