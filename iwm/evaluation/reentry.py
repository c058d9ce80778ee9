"""Re-entry of a prediction into the predictor, for several passes in a row.

The predictor receives an encoder's output and approximates target features. Where loss.normalize_targets is set, these
are layer-normalised: they lack mean and standard deviation of each token, which the input has. A prediction therefore
takes both from its own token in the source's features, where they depend on the encoder's final norm more than on the
view. Without loss.normalize_targets a prediction re-enters as it is.

Solving for mean and deviation from that norm's weights and biases is exact for target features, but dimensions with
small weights decide, so that it fails for predictions where the weights are unequal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iwm.models.world_model import WorldModel


def reenter(
    model: WorldModel, predictions: Float[Tensor, "b n d"], source: Float[Tensor, "#b n d"]
) -> Float[Tensor, "b n d"]:
    """Return predictions, or target features, as input of the predictor, in float32.

    source: encoder's features of the image or images that the first pass began with.
    """
    if not model.config.loss.normalize_targets:
        return predictions.float()
    mean, deviation = source.float().mean(-1, keepdim=True), source.float().std(-1, keepdim=True, correction=0)
    return mean + deviation * predictions.float()


@torch.no_grad()
def predict_in_parts(
    model: WorldModel, features: Float[Tensor, "b n d"], actions: Float[Tensor, "b k"], batch_size: int
) -> Float[Tensor, "b n d"]:
    """Predict one action from each input of the predictor, `batch_size` at a time, in float32."""
    parts = zip(features.split(batch_size), actions.split(batch_size), strict=True)
    return torch.cat([model.predict(*part).float() for part in parts])


@torch.no_grad()
def predict_in_a_row(
    model: WorldModel, source: Float[Tensor, "b n d"], actions: Float[Tensor, "s b k"], batch_size: int
) -> Float[Tensor, "b n d"]:
    """Predict several actions one after another from each source, and return the last prediction.

    source: encoder's features. actions: axis 0 is the pass.
    """
    predictions = predict_in_parts(model, source, actions[0], batch_size)
    for action in actions[1:]:
        predictions = predict_in_parts(model, reenter(model, predictions, source), action, batch_size)
    return predictions
