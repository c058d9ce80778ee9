"""Triton kernels of the project: compiled on a GPU, interpreted elsewhere."""

import sys

from tests.training.runs import finish


def test_the_kernels_and_their_gradients_are_those_of_fp32() -> None:
    """Run in a separate process, because Triton decides at a kernel's definition whether to interpret it."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=-ra --strict-markers"]
    cases = [f"tests/kernels/{kernel}_cases.py" for kernel in ("short_attention", "mlp", "residual_norm", "step")]
    finish([sys.executable, "-m", "pytest", *options, *cases])
