"""Evaluations of a study's runs: MRR on banks, similarity, and downstream protocols. Imports neither torch nor DALI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dali_pipelines.augmentations import JitterImpl
from iwm.config import ConfigError
from iwm.downstream.protocol_settings import FinetunePredictorSettings
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.settings import BankSize
from shards.command_line import Subcommand, parse_subcommand

MULTITASK = "multitask"
"""Protocol without a single score, so that a study has no table for it."""

OWN = ("--checkpoint", "--output")
"""Options that the study sets."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a run."""

    protocol: str
    output: str
    """Name of its file in RUN/eval, without suffix."""
    options: tuple[str, ...]
    settings: dict[str, Any]
    """Expected settings in the result file; with other settings the evaluation runs again."""

    @property
    def trains(self) -> bool:
        """True for a downstream protocol, which keeps its training in a folder of the file's name."""
        return self.protocol in PROTOCOLS


def mrr_file(bank: str) -> str:
    """Return the name of the MRR file of a bank."""
    return f"mrr-{bank}"


def protocol_file(protocol: str) -> str:
    """Return the name of a protocol's file, which differs from that of `iwm evaluate` without --output."""
    return f"study-{protocol}"


def mrr_on_bank(name: str, scenario: str, jitter_impl: JitterImpl | None, bank: BankSize) -> Evaluation:
    """Return the MRR on a bank. name: of its file; scenario: whose jitter the bank is sampled from."""
    sizes = (
        "--bank.num-images",
        str(bank.num_images),
        "--bank.num-views",
        str(bank.num_views),
        "--bank.batch-size",
        str(bank.batch_size),
    )
    computed = () if jitter_impl is None else ("--jitter-impl", jitter_impl)
    settings = {"bank": {**asdict(bank), "scenario": scenario}}
    return Evaluation("mrr", mrr_file(name), ("--bank.scenario", scenario, *computed, *sizes), settings)


def similarity_of(scenario: str, images: int) -> Evaluation:
    """Return the similarity of views with a scenario's augmentation."""
    options = ("--scenario", scenario, "--num-images", str(images))
    return Evaluation("similarity", "similarity", options, {"scenario": scenario, "num_images": images})


def split_sections(arguments: Sequence[str]) -> tuple[list[str], list[str], list[list[str]]]:
    """Return the study's own options, those of training, and the protocols: each its name and its options.

    The sections are separated by `--`. That of training, which begins with an option, may be missing.
    """
    sections: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            sections.append([])
        else:
            sections[-1].append(argument)
    own, *rest = sections
    has_training = bool(rest) and (not rest[0] or rest[0][0].startswith("-"))
    return own, rest[0] if has_training else [], rest[1:] if has_training else rest


def protocol_evaluations(sections: Sequence[Sequence[str]]) -> tuple[Evaluation, ...]:
    """Return the evaluation of each protocol, given as its name and its options.

    Without --predictors, `finetune-predictor` finetunes the pretrained predictor only, as table S2. Raises UserError
    for a protocol that is unknown or given twice, and for options that are out of range or that the study sets;
    SystemExit for options that do not exist.
    """
    found: dict[str, Evaluation] = {}
    for section in sections:
        if not section:
            raise ConfigError(f"-- is not followed by a protocol; name one of {', '.join(PROTOCOLS)}, or omit it")
        name, *options = section
        if name in found or name == MULTITASK:
            reason = "has no single score" if name == MULTITASK else "is given twice"
            raise ConfigError(f"-- {name}: the protocol {reason}; omit it")
        for option in OWN:
            if any(word == option or word.startswith(f"{option}=") for word in options):
                raise ConfigError(f"-- {name} {option}: the study sets it for each run; omit it")
        settings = _parse(name, options)
        if isinstance(settings, FinetunePredictorSettings) and settings.predictors is None:
            options += ["--predictors", "pretrained"]
            settings = _parse(name, options)
        if isinstance(settings, FinetunePredictorSettings) and "pretrained" not in (settings.predictors or ()):
            raise ConfigError(
                f"-- {name} --predictors: the study's table shows the pretrained predictor; add pretrained"
            )
        settings.check()
        found[name] = Evaluation(name, protocol_file(name), tuple(options), _comparable(settings))
    return tuple(found.values())


def _parse(name: str, options: Sequence[str]) -> TrainSettings:
    known = {protocol: Subcommand(PROTOCOLS[protocol].settings) for protocol in PROTOCOLS if protocol != MULTITASK}
    arguments = [name, "--checkpoint", "RUN", *options]
    settings: TrainSettings = parse_subcommand(
        known, arguments, prog="iwm/ablate.py … --", description=None, noun="protocol"
    )[1]
    return settings


def _comparable(settings: TrainSettings) -> dict[str, Any]:
    """Return all settings but those that the study sets, as they are read from a result file."""
    stored: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return {name: value for name, value in stored.items() if f"--{name}" not in OWN}
