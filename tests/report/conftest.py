"""A small real run to make pages of: the one that evaluation is tested with. Results of one's own with their tables."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import pytest
from playwright.sync_api import Browser

from iwm.evaluation.registry import EVALUATORS
from tests.evaluation.conftest import config, shards, untrained
from tools.screenshot import NoBrowser, chromium

__all__ = ["config", "shards", "untrained", "with_tables"]


def with_tables(result: dict[str, Any]) -> dict[str, Any]:
    """A result as iwm/evaluate.py writes it."""
    return {**result, "tables": [asdict(table) for table in EVALUATORS[result["protocol"]].tables(result)]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield opened
