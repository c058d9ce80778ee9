"""Photometric Triton kernels: compiled on a GPU, interpreted elsewhere; their machine code needs no GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from dali_pipelines.augmentations import OPS, SOURCE, TARGET
from dali_pipelines.photometric_kernels import BYTES, KERNEL_OPS, PIXELS, SUMMED_PIXELS, missing_ops
from dali_pipelines.views import SCENARIOS, Views
from tests.training.runs import finish


def test_the_kernels_are_the_replay() -> None:
    """Run in a separate process, because Triton decides at a kernel's definition whether to interpret it."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=-ra --strict-markers"]
    finish([sys.executable, "-m", "pytest", *options, "tests/dali_pipelines/photometric_kernel_cases.py"])


def test_the_kernels_have_every_op_of_the_paper() -> None:
    assert tuple(op.name for op in OPS if op.in_paper) == KERNEL_OPS
    assert missing_ops(Views()) == []
    assert missing_ops(SCENARIOS["extended"]) == ["gamma", "temperature"]
    assert missing_ops(SCENARIOS["geometric"]) == ["rotation"]


def test_no_argument_has_a_name_that_tritons_launcher_overwrites() -> None:
    pytest.importorskip("triton")
    from dali_pipelines import photometric_triton

    for name in ("grey_sums_kernel", "views_kernel", "blur_kernel"):
        assert not {"params", "specialization", "options"} & set(getattr(photometric_triton, name).arg_names)


VIEWS = {"first": SOURCE.start, "second": TARGET.start, "pixels": 224 * 224, "parts": 49}
KERNELS: list[tuple[str, dict[str, Any]]] = [
    *(("grey_sums_kernel", {**VIEWS, "linear": linear, "block": SUMMED_PIXELS}) for linear in (True, False)),
    *(
        ("views_kernel", {**VIEWS, "jitter": jitter, "centred": True, "slots": 64, "block": PIXELS})
        for jitter in ("linear", "torchvision")
    ),
    (
        "blur_kernel",
        {"first": SOURCE.start, "reach": 6, "along_rows": False, "height": 224, "width": 224, "block": BYTES},
    ),
]


@pytest.mark.parametrize(("name", "constants"), KERNELS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_kernels_compile_for_a_hopper_gpu_without_one(name: str, constants: dict[str, Any]) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dali_pipelines import photometric_triton

    kernel = getattr(photometric_triton, name)
    pointers = {"drawn": "*fp32", "sums": "*i32"}
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "*u8")
        for argument in kernel.arg_names
    }
    made = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    assert made.asm["cubin"][:4] == b"\x7fELF"
    if constants.get("jitter") != "linear":  # its cosine has multiply-adds of its own
        assert "fma.rn" not in made.asm["ptx"]
