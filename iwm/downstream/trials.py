"""Trials: trained modules of the downstream protocols (paper, A.2).

Classification: a probe; a finetuned encoder, predictor, or both; a predictor for several tasks. Segmentation: UPerNet
on the last four layers of an encoder, a predictor, or both. Predictors may be trained with actions that are sampled as
in pretraining, instead of the null action (tables 3, S3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dali_pipelines.augmentations import MEAN_COLOUR
from dali_pipelines.replay import sample_photometric
from dali_pipelines.views import Views
from iwm.actions import ActionSpec, action_between
from iwm.downstream.study import PIXELS, SharedInputs, Trial
from iwm.encoder_outputs import EncoderName
from iwm.models.backbone import Backbone
from iwm.models.heads import UPerNet, segmentation_loss
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.packing import copy_to_device


def sample_actions(views: Views, spec: ActionSpec, count: int, generator: torch.Generator) -> Float[Tensor, "b k"]:
    """Sample actions between `count` pairs of source and target parameters of a run's views, on the CPU.

    generator: CPU generator, the only source of randomness.
    """
    source = sample_photometric(views.source, count, generator)
    return action_between(source, sample_photometric(views.target, count, generator), spec)


ActionSampler = tuple[Views, ActionSpec]
"""Views and layout by which actions are sampled in training. Evaluation uses the null action."""


class ClassifierTrial(Trial):
    """Trial of one classification task."""

    def loss(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        return F.cross_entropy(self.logits(shared, 0).float(), targets[0])


class Probe(ClassifierTrial):
    """Head (iwm.models.heads) on a frozen encoder's tokens: patches, class token, registers."""

    def __init__(self, head: nn.Module, features: EncoderName) -> None:
        """Set the head. features: name of the encoder."""
        super().__init__()
        self.head, self._features = head, features

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head(shared[self._features])
        return logits


class FinetunedEncoder(ClassifierTrial):
    """Encoder in training with a head on its patches."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head(self.backbone.patches(shared[PIXELS]))
        return logits


class FinetunedPredictor(Trial):
    """Predictor in training on a frozen encoder, for one task (paper, 5.1)."""

    def __init__(
        self,
        predictor_backbone: PredictorBackbone,
        head: nn.Module,
        features: EncoderName,
        num_prefix_tokens: int,
        action_sampler: ActionSampler | None = None,
        task: int = 0,
    ) -> None:
        """Set predictor and head.

        features: name of the encoder. num_prefix_tokens: its tokens before the patches. action_sampler: samples the
        actions in training; None: the null action. task: index of the task whose images it sees, if there are several.
        """
        super().__init__()
        self.predictor_backbone, self.head = predictor_backbone, head
        self._features, self._prefix, self._task = features, num_prefix_tokens, task
        self._action_sampler = action_sampler

    def loss(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        tokens = shared[self._features]
        if len(targets) > 1:
            tokens = tokens.split([len(of_task) for of_task in targets])[self._task]
        return F.cross_entropy(self._forward(tokens).float(), targets[self._task])

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c"]:
        return self._forward(shared[self._features])

    def _forward(self, tokens: Float[Tensor, "b s e"]) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head(
            self.predictor_backbone(
                select_context(self.predictor_backbone, tokens, self._prefix), sample_actions_for(self, tokens)
            )
        )
        return logits

    @property
    def action_sampler(self) -> ActionSampler | None:
        """Sampler of actions in training; None: the null action."""
        return self._action_sampler


class FinetunedEncoderPredictor(ClassifierTrial):
    """Encoder and predictor in training, end to end."""

    def __init__(self, backbone: Backbone, predictor_backbone: PredictorBackbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.predictor_backbone, self.head = backbone, predictor_backbone, head

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c"]:
        tokens = select_context(
            self.predictor_backbone, self.backbone.tokens(shared[PIXELS]), self.backbone.num_prefix_tokens
        )
        logits: Tensor = self.head(self.predictor_backbone(tokens))
        return logits


class MultitaskPredictor(Trial):
    """Predictor in training for several tasks at once, with a token and a head per task (5.2)."""

    def __init__(
        self,
        predictor_backbone: PredictorBackbone,
        heads: Sequence[nn.Module],
        features: EncoderName,
        num_prefix_tokens: int,
    ) -> None:
        """Set predictor and heads. predictor_backbone: has a token per task. heads: in the order of the tasks."""
        super().__init__()
        self.predictor_backbone, self.heads = predictor_backbone, nn.ModuleList(heads)
        self._features, self._prefix = features, num_prefix_tokens

    def loss(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Return the sum of the tasks' losses (figure S2)."""
        tokens = shared[self._features]
        sizes = [len(of_task) for of_task in targets]
        task = torch.cat([torch.full((size,), number, device=tokens.device) for number, size in enumerate(sizes)])
        outputs = self.predictor_backbone(
            select_context(self.predictor_backbone, tokens, self._prefix), task=task
        ).split(sizes)
        pairs = zip(self.heads, outputs, targets, strict=True)
        return torch.stack([F.cross_entropy(head(output).float(), target) for head, output, target in pairs]).sum()

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c"]:
        tokens = shared[self._features]
        task_ids = torch.full((len(tokens),), task, device=tokens.device)
        logits: Tensor = self.heads[task](
            self.predictor_backbone(select_context(self.predictor_backbone, tokens, self._prefix), task=task_ids)
        )
        return logits


def select_context(
    predictor_backbone: PredictorBackbone, tokens: Float[Tensor, "b s e"], prefix: int
) -> Float[Tensor, "b s2 e"]:
    """Return the predictor's inputs among an encoder's tokens. prefix: number of tokens before the patches."""
    return tokens[:, prefix - predictor_backbone.num_prefix_tokens :]


def sample_actions_for(trial: FinetunedPredictor, tokens: Float[Tensor, "b s e"]) -> Float[Tensor, "b k"] | None:
    """Sample actions for a batch in training, from torch's default generator; None for the null action."""
    if trial.action_sampler is None or not trial.training:
        return None
    views, spec = trial.action_sampler
    return copy_to_device(sample_actions(views, spec, len(tokens), torch.default_generator), tokens.device)


LAYERS = 4
"""Last layers that UPerNet receives."""


class Segmenter(Trial):
    """UPerNet on four layers of a trained encoder, of a trained predictor on a frozen encoder, or of both trained."""

    def __init__(
        self,
        head: UPerNet,
        patch: int,
        *,
        backbone: Backbone | None,
        predictor_backbone: PredictorBackbone | None,
        features: EncoderName,
        num_prefix_tokens: int,
    ) -> None:
        """Set the head and the trained parts.

        backbone, predictor_backbone: trained parts, or None. features, num_prefix_tokens: name of the encoder that is
        frozen without a backbone, and its tokens before the patches.
        """
        super().__init__()
        self.head, self.backbone, self.predictor_backbone = head, backbone, predictor_backbone
        self._patch, self._features, self._prefix = patch, features, num_prefix_tokens
        if head.layer_norm in ("own", "none"):
            # DDP expects a gradient of every parameter that is trained.
            if predictor_backbone is not None:
                predictor_backbone.predictor.norm.requires_grad_(False)
            elif backbone is not None:
                backbone.vit.norm.requires_grad_(False)

    def loss(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        logits, auxiliary = self._forward(shared)
        return segmentation_loss(logits, auxiliary, targets[0])

    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "b c y x"]:
        return self._forward(shared)[0]

    def _forward(self, shared: SharedInputs) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, "b c h w"] | None]:
        pixels = shared[PIXELS]
        grid = (pixels.shape[1] // self._patch, pixels.shape[2] // self._patch)
        if self.predictor_backbone is None:
            assert self.backbone is not None  # one of the two is trained
            layers = self.backbone.get_intermediate_layers(pixels, LAYERS, self.head.layer_norm)
        else:
            tokens = shared[self._features] if self.backbone is None else self.backbone.tokens(pixels)
            layers = self.predictor_backbone.get_intermediate_layers(
                select_context(self.predictor_backbone, tokens, self._prefix),
                grid,
                LAYERS,
                layer_norm=self.head.layer_norm,
            )
        outputs: tuple[Tensor, Tensor | None] = self.head(layers, grid)
        return outputs


def pad_to_patches(images: UInt8[Tensor, "*b h w 3"], patch: int) -> Float[Tensor, "*b h2 w2 3"]:
    """Pad images below and on the right with the mean colour, to multiples of the patch and at least two patches."""
    height, width = (max(2, -(-side // patch)) * patch for side in images.shape[-3:-1])
    mean = torch.tensor(MEAN_COLOUR, device=images.device)
    offset = images.float() - mean
    return F.pad(offset, (0, 0, 0, width - images.shape[-2], 0, height - images.shape[-3])) + mean
