"""Registries of evaluators and protocols: every name that an entry gives exists."""

from importlib import import_module

import pytest

from iwm.downstream import restore
from iwm.downstream.context import Runner
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.registry import EVALUATORS
from iwm.evaluation.settings import EvalSettings


@pytest.mark.parametrize("name", EVALUATORS)
def test_an_evaluators_module_evaluates_and_makes_tables(name: str) -> None:
    evaluator = EVALUATORS[name]
    module = import_module(evaluator.module)
    assert issubclass(evaluator.settings, EvalSettings)
    assert callable(module.evaluate)
    assert callable(module.tables)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_has_options_a_runner_and_a_trial(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert issubclass(protocol.settings, TrainSettings)
    assert isinstance(protocol.runner, Runner)
    assert callable(getattr(restore, protocol.trial))


def test_no_two_entries_share_their_options() -> None:
    """Check what the command line needs: it tells subcommands apart by the class of their options."""
    entries = [*EVALUATORS.values(), *PROTOCOLS.values()]
    assert len({entry.settings for entry in entries}) == len(entries)
