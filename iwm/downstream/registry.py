"""Registry of the downstream protocols; importing it does not need DALI.

To add a protocol, write a module in this folder that defines a `Command`, a function in restore.py that rebuilds its
trial, and an entry in PROTOCOLS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from iwm.config import Config, ConfigError
from iwm.downstream import restore
from iwm.downstream.progress import TrainedHead
from iwm.downstream.study import Trial
from iwm.models.backbone import Backbone

if TYPE_CHECKING:
    from iwm.downstream.context import Command


@dataclass(frozen=True)
class Protocol:
    """A downstream protocol."""

    location: str
    """MODULE:NAME of its `Command` in this folder. It is imported when the protocol runs, because training needs DALI
    and loading a model does not."""
    build_trial: Callable[[TrainedHead, Config, Backbone], Trial]
    """Function that builds the trial of a trained head with new parameters, into which best.pt is loaded. Where the
    encoder was finetuned too, the trial contains the given backbone itself."""
    title: str
    """Heading of its results."""
    card: str
    """Noun phrase for the trained part, for the card of an exported model."""
    linear: bool = False
    """True where the head is a linear layer on the mean of the patches, as in timm's VisionTransformer."""
    finetunes_encoder: Callable[[TrainedHead], bool] = lambda head: False
    """Predicate of a trained head: True where the encoder was trained too and differs from the run's."""

    @property
    def command(self) -> Command:
        """Settings, training and tables of the protocol."""
        command: Command = resolve_name(f"iwm.downstream.{self.location}")
        return command


PROTOCOLS: dict[str, Protocol] = {
    "linear": Protocol(
        "probing:LINEAR",
        restore.build_linear_probe,
        title="Linear probing",
        card="a linear layer on the mean of the frozen encoder's patches",
        linear=True,
    ),
    "attentive": Protocol(
        "probing:ATTENTIVE",
        restore.build_attentive_probe,
        title="Attentive probing",
        card="attention pooling by one learned query and a linear layer, on the frozen encoder's patches",
    ),
    "finetune-encoder": Protocol(
        "finetuning:ENCODER",
        restore.build_finetuned_encoder,
        title="Encoder finetuning",
        card="the encoder, finetuned with a linear layer on the mean of its patches",
        linear=True,
        finetunes_encoder=lambda head: True,
    ),
    "finetune-predictor": Protocol(
        "finetuning:PREDICTOR",
        restore.build_finetuned_predictor,
        title="Predictor finetuning, frozen encoder",
        card="the predictor, finetuned on the frozen encoder, with an attentive head on its prediction",
    ),
    "finetune-end-to-end": Protocol(
        "finetuning:END_TO_END",
        restore.build_finetuned_end_to_end,
        title="End-to-end finetuning",
        card="the encoder and the predictor, finetuned together, with an attentive head",
        finetunes_encoder=lambda head: True,
    ),
    "multitask": Protocol(
        "multitask:MULTITASK",
        restore.build_multitask,
        title="Multitask finetuning of the predictor",
        card="one predictor, finetuned on the frozen encoder, with an attentive head for each task",
    ),
    "segmentation": Protocol(
        "segmentation:SEGMENTATION",
        restore.build_segmenter,
        title="Segmentation",
        card="UPerNet on four layers",
        finetunes_encoder=lambda head: head.metadata["part"] != "predictor",
    ),
}
"""Protocols in the order of the paper's section A.2."""


def lookup(name: str) -> Protocol:
    """Return the protocol of a name. Raises ConfigError for a name that is not registered."""
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol '{name}'; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
