"""Loading of trained heads from RUN/eval/NAME/best.pt, for export; does not need DALI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iwm.actions import action_spec
from iwm.config import Config, ConfigError
from iwm.downstream.progress import BEST, FORMAT, TaskInfo, TrainedHead
from iwm.downstream.study import Trial
from iwm.downstream.trials import (
    FinetunedEncoder,
    FinetunedEncoderPredictor,
    FinetunedPredictor,
    MultitaskPredictor,
    Probe,
    Segmenter,
)
from iwm.models.backbone import Backbone
from iwm.models.heads import BATCH_NORM_EPS, AttentiveHead, LinearHead, UPerNet
from iwm.models.predictor import Predictor
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.training.checkpoint import CheckpointError, load_verified

BACKBONE = "backbone.encoder."
"""Name prefix of a finetuned encoder's tensors."""


def load_head(folder: Path) -> tuple[TrainedHead, dict[str, Tensor]]:
    """Return the best trial of a protocol and its tensors, by the trial's parameter names.

    folder: RUN/eval/NAME. Raises CheckpointError where best.pt is missing or damaged, and ConfigError where it was
    trained on an external encoder.
    """
    path = folder / BEST
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no trained head ({BEST}); give the folder of a protocol, such as RUN/eval/linear"
        )
    content = load_verified(path, FORMAT)
    try:
        settings, names = content["settings"], _classes(content)
        external = settings.get("external.format")
        head = TrainedHead(
            protocol=content["protocol"],
            trial=content["trial"],
            checkpoint=settings["checkpoint"],
            epoch=content["epoch"],
            metadata=content["trial_metadata"][content["trial"]],
            channels=settings.get("channels"),
            layer_norm=settings.get("layer_norm", TrainedHead.layer_norm),
            tasks={
                name: TaskInfo(names[name], content["tasks"][name], scores)
                for name, scores in content["scores"].items()
            },
            interpolation=settings.get("crops.interpolation", "linear"),
            selection=content.get("selection", "val"),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} lacks {error}: another version of iwm wrote it; train the head again") from error
    if external is not None:
        raise ConfigError(f"{path} was trained on a {external} encoder; only heads trained on a run can be exported")
    return head, _without_batch_norm(content["state"]) if head.protocol == "linear" else content["state"]


def _without_batch_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a linear probe's tensors with its batch norm, if it has one, folded into the linear layer."""
    mean, variance = tensors.get("head.bn.running_mean"), tensors.get("head.bn.running_var")
    if mean is None or variance is None:
        return dict(tensors)
    weight, bias = tensors["head.fc.weight"].double(), tensors["head.fc.bias"].double()
    weight = weight / (variance.double() + BATCH_NORM_EPS).sqrt()
    folded = {"head.fc.weight": weight, "head.fc.bias": bias - weight @ mean.double()}
    return {name: folded[name].to(tensors[name].dtype) for name in folded}


def _classes(content: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the class names by task."""
    classes = content["classes"]
    if isinstance(classes, Mapping):
        return {task: tuple(names) for task, names in classes.items()}
    if isinstance(classes, int):
        first = int(content["settings"]["reduce_zero_label"])
        classes = [str(first + number) for number in range(classes)]
    return dict.fromkeys(content["scores"], tuple(classes))


def split_state(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """Return the finetuned encoder's tensors by the encoder's own names (None where it is frozen), and all others."""
    encoder = {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    return encoder or None, {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}


def build_linear_probe(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, on `backbone`."""
    return Probe(LinearHead(backbone.embed_dim, head.num_classes[0]), head.features)


def build_attentive_probe(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, on `backbone`."""
    classifier = AttentiveHead(backbone.embed_dim, backbone.num_heads, head.num_classes[0])
    return Probe(classifier, head.features)


def build_finetuned_encoder(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, around `backbone` itself."""
    return FinetunedEncoder(backbone, LinearHead(backbone.embed_dim, head.num_classes[0]))


def build_finetuned_predictor(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, on `backbone`."""
    predictor = _predictor_backbone(head, config)
    classifier = AttentiveHead(predictor.embed_dim, backbone.num_heads, head.num_classes[0])
    return FinetunedPredictor(predictor, classifier, head.features, backbone.num_prefix_tokens)


def build_finetuned_end_to_end(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, around `backbone` itself."""
    predictor = _predictor_backbone(head, config)
    classifier = AttentiveHead(predictor.embed_dim, backbone.num_heads, head.num_classes[0])
    return FinetunedEncoderPredictor(backbone, predictor, classifier)


def build_multitask(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, on `backbone`, for several tasks or one (control)."""
    if len(head.tasks) == 1:
        return build_finetuned_predictor(head, config, backbone)
    predictor = _predictor_backbone(head, config)
    heads = [AttentiveHead(predictor.embed_dim, backbone.num_heads, count) for count in head.num_classes]
    return MultitaskPredictor(predictor, heads, head.features, backbone.num_prefix_tokens)


def build_segmenter(head: TrainedHead, config: Config, backbone: Backbone) -> Trial:
    """Build the trial of `head` with new parameters, on `backbone`, or around it where it is trained."""
    part = head.metadata["part"]
    predictor = None if part == "encoder" else _predictor_backbone(head, config)
    assert head.channels is not None  # every segmentation has them
    width = backbone.embed_dim if predictor is None else predictor.predictor_dim
    return Segmenter(
        UPerNet(width, head.num_classes[0], channels=head.channels, layer_norm=head.layer_norm),
        backbone.patch_size,
        backbone=None if part == "predictor" else backbone,
        predictor_backbone=predictor,
        features=head.features,
        num_prefix_tokens=backbone.num_prefix_tokens,
    )


def _predictor_backbone(head: TrainedHead, config: Config) -> PredictorBackbone:
    """Build the predictor of a trained head with new parameters. config: that of the run."""
    predictor = Predictor(config, action_spec(config.action, config.views).size)
    tasks = len(head.tasks) if len(head.tasks) > 1 else 0
    return PredictorBackbone(
        predictor, output="token" if head.metadata.get("tokens") == "one" else "image", num_tasks=tasks
    )
