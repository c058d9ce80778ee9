"""DALI's errors: one line that tells a bad sample from memory that is used up."""

from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.outputs import run
from shards.manifest import ShardError

PAGE = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "reader.py", line 220, in decode
    return fn.decoders.image(

encountered:

{cause}
Current pipeline object is no longer valid."""


class Failing:
    """A pipeline whose run ends as DALI's do."""

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
def test_memory_is_told_as_memory(error: Exception) -> None:
    with pytest.raises(ShardError, match=r"^shards: DALI is out of memory: .*--data\.micro-batch") as told:
        run(Failing(error), Path("shards"))
    assert "verify" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_bad_sample_is_told_with_the_command_that_names_it() -> None:
    error = RuntimeError(PAGE.format(cause="Failed to decode sample #3"))
    with pytest.raises(ShardError, match=r"Failed to decode sample #3 in nvidia\.dali\.fn\.decoders\.image.*verify"):
        run(Failing(error), Path("shards"))
