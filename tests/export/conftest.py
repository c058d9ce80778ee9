"""Runs and trained heads to export: the fixtures of the downstream tests."""

from tests.downstream.conftest import boxes, leverage, run, small

__all__ = ["boxes", "leverage", "run", "small"]
