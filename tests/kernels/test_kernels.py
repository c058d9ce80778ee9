"""Triton kernels of the project: compiled on a GPU, interpreted elsewhere."""

import sys

import pytest

from iwm.kernels.residual_norm import TILING
from tests.training.runs import finish


def test_the_kernels_and_their_gradients_are_those_of_fp32() -> None:
    """Run in a separate process, because Triton decides at a kernel's definition whether to interpret it."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=-ra --strict-markers"]
    cases = [f"tests/kernels/{kernel}_cases.py" for kernel in ("short_attention", "mlp", "residual_norm", "step")]
    finish([sys.executable, "-m", "pytest", *options, *cases])


@pytest.mark.parametrize("dim", [384, 512, 768, 1024])
def test_the_norms_kernel_compiles_for_a_hopper_gpu_without_one(dim: int) -> None:
    """Check also that a program needs a small part of the 227 KiB of shared memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iwm.kernels.residual_norm_triton import backward_kernel

    columns = 1 << (dim - 1).bit_length()
    constants = {"dim": dim, "ways": TILING.programs, "rows": TILING.elements // columns, "columns": columns}
    constants["stages"] = TILING.stages
    pointers = dict.fromkeys(("mean", "rstd", "weight", "sums"), "*fp32") | {"tokens": "i32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*bf16") for name in backward_kernel.arg_names
    }
    made = triton.compile(
        ASTSource(backward_kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": TILING.warps},
    )
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert made.metadata.shared < 64 * 2**10
