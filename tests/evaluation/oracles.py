"""World models over pixels that can be reasoned about."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dali_pipelines.augmentations import IDENTITY
from dali_pipelines.replay import apply_photometric
from dali_pipelines.views import Views
from iwm.actions import action_spec
from iwm.config import Config
from iwm.evaluation.common import EvalContext
from iwm.evaluation.held_out import EvalSplit
from iwm.model_config import ActionConfig
from iwm.models.world_model import WorldModel

VIEWS = Views(size=16)


class Oracle(WorldModel):
    """A world model over pixels that can be reasoned about: features are 4×4 patches, the predictor undoes the action
    vector into jitter parameters and applies them to the picture itself."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without encoders: the features are the pixels
        self.config = Config(views=VIEWS)
        self.action_spec = action_spec(ActionConfig(), VIEWS)

    def encode(self, images: Tensor, which: str) -> Tensor:
        return images.float().reshape(len(images), 16, -1)

    def target_features(self, images: Tensor) -> Tensor:
        return self.encode(images, "teacher")

    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        images = context.reshape(-1, VIEWS.size, VIEWS.size, 3).round().byte()
        params = torch.tensor(IDENTITY).repeat(len(action), 1)
        params[:, :4] += action[:, :4] * torch.tensor(self.action_spec.scale)
        return self.encode(apply_photometric(images, params, VIEWS.jitter_impl), "teacher")


class Blind(Oracle):
    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        return context


class Knowing(Oracle):
    """Told that its source was made grayscale, blurred or solarized, it begins from the clean image, which it knows."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = self.encode(clean[None], "teacher")

    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        destroyed = action[:, 4:7].any(1)[:, None, None]
        return super().predict(torch.where(destroyed, self.clean, context), action)


def context_of(model: WorldModel) -> EvalContext:
    """Context of a model that has neither a run nor data."""
    nowhere = Path("unused")
    return EvalContext(model, model.config, nowhere, nowhere, EvalSplit(nowhere, "val"), torch.device("cpu"))
