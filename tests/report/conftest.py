"""A small real run to make pages of: the one that evaluation is tested with."""

from tests.evaluation.conftest import config, shards, untrained

__all__ = ["config", "shards", "untrained"]
