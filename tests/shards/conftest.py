"""An S3 server that the tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from local_servers import s3_server


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    with s3_server() as variables:
        yield variables


@pytest.fixture
def s3(s3_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Set the variables that lead to the S3 server, and return them; its bucket is `bucket`."""
    import s3fs

    # File systems are cached by their arguments, not by the variables that they read.
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    yield s3_variables
    s3fs.S3FileSystem.clear_instance_cache()
