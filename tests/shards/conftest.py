"""An S3 server that the tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import S3_VARIABLES, s3_server


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Set the variables that lead to the S3 server, and return them; its bucket is `bucket`."""
    import s3fs

    # File systems are cached by their arguments, not by the variables that they read.
    s3fs.S3FileSystem.clear_instance_cache()
    variables = {**S3_VARIABLES, "AWS_ENDPOINT_URL": s3_address}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield variables
    s3fs.S3FileSystem.clear_instance_cache()
