"""Registry of the downstream protocols; importing it imports neither torch nor DALI nor tyro.

To add a protocol, write its options in protocol_settings.py, its `Runner` in a module of this folder and a function
in restore.py that rebuilds its trial, and add an entry to PROTOCOLS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from iwm.config import Config, ConfigError

if TYPE_CHECKING:
    from iwm.downstream.context import Runner
    from iwm.downstream.progress import TrainedHead
    from iwm.downstream.settings import TrainSettings
    from iwm.downstream.study import Trial
    from iwm.models.backbone import Backbone


@dataclass(frozen=True)
class Protocol:
    """A downstream protocol. Its parts are imported on use: training needs DALI, loading a model does not."""

    options: str
    """Class of its options in protocol_settings.py (`settings`)."""
    location: str
    """MODULE:NAME of its `Runner` in this folder (`runner`)."""
    trial: str
    """Function of restore.py that builds the trial of a trained head (`build_trial`)."""
    title: str
    """Heading of its results."""
    card: str
    """Noun phrase for the trained part, for the card of an exported model."""
    linear: bool = False
    """True where the head is a linear layer on the mean of the patches, as in timm's VisionTransformer."""
    finetunes_encoder: Callable[[TrainedHead], bool] = lambda head: False
    """Predicate of a trained head: True where the encoder was trained too and differs from the run's."""

    @property
    def settings(self) -> type[TrainSettings]:
        """Dataclass of the protocol's options."""
        settings: type[TrainSettings] = resolve_name(f"iwm.downstream.protocol_settings:{self.options}")
        return settings

    @property
    def runner(self) -> Runner:
        """Training and tables of the protocol."""
        runner: Runner = resolve_name(f"iwm.downstream.{self.location}")
        return runner

    def build_trial(self, head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
        """Build the trial of a trained head with new parameters, into which best.pt is loaded.

        Where the encoder was finetuned too, the trial contains the given backbone itself.
        """
        trial: Trial = resolve_name(f"iwm.downstream.restore:{self.trial}")(head, config, backbone)
        return trial


PROTOCOLS: dict[str, Protocol] = {
    "linear": Protocol(
        "LinearProbeSettings",
        "probing:LINEAR",
        "build_linear_probe",
        title="Linear probing",
        card="a linear layer on the mean of the frozen encoder's patches",
        linear=True,
    ),
    "attentive": Protocol(
        "AttentiveProbeSettings",
        "probing:ATTENTIVE",
        "build_attentive_probe",
        title="Attentive probing",
        card="attention pooling by one learned query and a linear layer, on the frozen encoder's patches",
    ),
    "finetune-encoder": Protocol(
        "FinetuneEncoderSettings",
        "finetuning:ENCODER",
        "build_finetuned_encoder",
        title="Encoder finetuning",
        card="the encoder, finetuned with a linear layer on the mean of its patches",
        linear=True,
        finetunes_encoder=lambda head: True,
    ),
    "finetune-predictor": Protocol(
        "FinetunePredictorSettings",
        "finetuning:PREDICTOR",
        "build_finetuned_predictor",
        title="Predictor finetuning, frozen encoder",
        card="the predictor, finetuned on the frozen encoder, with an attentive head on its prediction",
    ),
    "finetune-end-to-end": Protocol(
        "FinetuneEndToEndSettings",
        "finetuning:END_TO_END",
        "build_finetuned_end_to_end",
        title="End-to-end finetuning",
        card="the encoder and the predictor, finetuned together, with an attentive head",
        finetunes_encoder=lambda head: True,
    ),
    "multitask": Protocol(
        "MultitaskSettings",
        "multitask:MULTITASK",
        "build_multitask",
        title="Multitask finetuning of the predictor",
        card="one predictor, finetuned on the frozen encoder, with an attentive head for each task",
    ),
    "segmentation": Protocol(
        "SegmentationSettings",
        "segmentation:SEGMENTATION",
        "build_segmenter",
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
