"""The project's Triton kernels: on a GPU as they are, elsewhere interpreted."""

import sys

from tests.training.runs import finish


def test_the_kernels_and_their_gradients_are_those_of_fp32() -> None:
    """In a process of its own, for Triton decides whether to interpret a kernel where it is defined."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=-ra --strict-markers"]
    cases = ["tests/kernels/short_attention_cases.py", "tests/kernels/mlp_cases.py"]
    finish([sys.executable, "-m", "pytest", *options, *cases])
