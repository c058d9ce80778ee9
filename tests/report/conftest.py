"""A small real run to make pages of: the one that evaluation is tested with. Results of one's own with their tables."""

from dataclasses import asdict
from typing import Any

from iwm.evaluation.registry import EVALUATORS
from tests.evaluation.conftest import config, shards, untrained

__all__ = ["config", "shards", "untrained", "with_tables"]


def with_tables(result: dict[str, Any]) -> dict[str, Any]:
    """A result as iwm/evaluate.py writes it."""
    return {**result, "tables": [asdict(table) for table in EVALUATORS[result["protocol"]].tables(result)]}
