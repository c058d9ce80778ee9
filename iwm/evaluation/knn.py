"""k-nearest-neighbour classification of frozen features (Wu et al., 2018; k and temperature as in DINO).

The k training images nearest to a held-out image vote for its class, by cosine similarity of features averaged over
tokens. The weight of a vote is exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from iwm.config import ConfigError
from iwm.encoder_outputs import ENCODERS
from iwm.evaluation.common import EvalContext, proportion_stderr
from iwm.evaluation.features import extract_features
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import KNNSettings


@torch.no_grad()
def knn_predict(
    test: Float[Tensor, "m d"],
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    ks: Sequence[int],
    temperature: float,
    batch_size: int = 256,
) -> Int64[Tensor, "s m"]:
    """Predict the class of each row of `test` for each of `ks`; the result stays on the features' device."""
    train = F.normalize(train.float(), dim=1)
    parts = []
    for rows in F.normalize(test.float(), dim=1).split(batch_size):
        # Autocast would round the similarities, which differ by little, to bf16.
        with torch.autocast(rows.device.type, enabled=False):
            similarity, nearest = (rows @ train.T).topk(max(ks), dim=1)
        weights = (similarity / temperature).exp().double()
        neighbour_labels = labels[nearest]
        votes = weights.new_zeros(len(rows), classes)
        winners = {
            k: votes.scatter_add(1, neighbour_labels[:, :k], weights[:, :k]).argmax(dim=1) for k in dict.fromkeys(ks)
        }
        parts.append(torch.stack([winners[k] for k in ks]))
    return torch.cat(parts, dim=1)


def evaluate(context: EvalContext, settings: KNNSettings, output: Path) -> dict[str, Any]:
    """Compute accuracy (0 to 1) with its standard error, by encoder and number of neighbours.

    With fewer training images than neighbours, all training images vote, and a note says so. Raises ConfigError for
    invalid settings and a given label or training split that does not exist, MissingDataError where the data lack
    labels or a second split.
    """
    if not settings.k or list(settings.k) != sorted(set(settings.k)):
        raise ConfigError(f"--k {' '.join(map(str, settings.k))}: give ascending numbers from 1, for example 10 20 100")

    def features(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        return torch.stack([context.model.encode(images, encoder).float().mean(1) for encoder in ENCODERS], dim=1)

    data = extract_features(context, settings, features)
    most = len(data.train_labels)
    ks = sorted({min(k, most) for k in settings.k})
    if settings.k[-1] > most:
        context.notes.append(f"k = {most} instead of more neighbours: there are {most} training images")
    accuracies = {}
    for i, encoder in enumerate(ENCODERS):
        predicted = knn_predict(
            data.test[:, i],
            data.train[:, i],
            data.train_labels,
            len(data.splits.classes),
            ks,
            settings.temperature,
            settings.batch_size,
        )
        correct = (predicted == data.test_labels).double().mean(dim=1)
        errors = proportion_stderr(correct, len(data.test_labels))
        scores = zip(ks, correct.tolist(), errors.tolist(), strict=True)
        accuracies[encoder] = {str(k): {"mean": mean, "standard_error": error} for k, mean, error in scores}
    return {**data.metadata(), "accuracy": accuracies}


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the accuracy of each encoder by number of neighbours."""
    caption = (
        f"'{result['label']}', {result['classes']} classes, {result['train_images']} training and "
        f"{result['val_images']} held-out images; chance (majority class) {100 * result['chance']:.1f}."
    )
    columns = ["encoder", *(f"k = {k}" for k in result["accuracy"][ENCODERS[0]])]
    rows = [
        [encoder, *(format_mean_stderr(score, 1, 100) for score in scores.values())]
        for encoder, scores in result["accuracy"].items()
    ]
    return [ResultTable("Nearest neighbours, accuracy in % ± standard error", columns, rows, caption)]
