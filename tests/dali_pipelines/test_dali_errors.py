"""DALI's errors: one line each, which distinguishes damaged samples from memory that ran out."""

from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.outputs import run_pipeline
from shards.errors import ShardError

PAGE = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "reader.py", line 220, in decode
    return fn.decoders.image(

encountered:

{cause}
Current pipeline object is no longer valid."""


class Failing:
    """A pipeline whose run raises an error like DALI's."""

    device_id = None

    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self) -> Any:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(PAGE.format(cause="CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")),
        RuntimeError(PAGE.format(cause="CUDA allocation failed: out of memory")),
        RuntimeError(PAGE.format(cause="std::bad_alloc")),
        RuntimeError(PAGE.format(cause="nvJPEG error: NVJPEG_STATUS_ALLOCATOR_FAILURE")),
        MemoryError("std::bad_alloc"),
    ],
)
def test_a_failed_allocation_is_reported_as_out_of_memory(error: Exception) -> None:
    with pytest.raises(ShardError, match=r"^shards: DALI is out of memory: .*--data\.micro-batch") as raised:
        run_pipeline(Failing(error), Path("shards"))
    assert "verify" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_sample_is_reported_with_the_command_that_names_it() -> None:
    error = RuntimeError(PAGE.format(cause="Failed to decode sample #3"))
    with pytest.raises(ShardError, match=r"Failed to decode sample #3 in nvidia\.dali\.fn\.decoders\.image.*verify"):
        run_pipeline(Failing(error), Path("shards"))
