"""Nearest neighbours: the vote as it is written out, real runs, and labels that do not allow it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iwm.config import Config, ConfigError
from iwm.evaluation.knn import knn_predict, tables
from iwm.evaluation.settings import EvalData, KNNSettings
from iwm.protocols import evaluate
from tests.evaluation.conftest import untrained


@pytest.fixture(scope="module")
def labelled_run(tiny_shards: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on shards with a train split of 100 images and 24 held-out ones, of two classes."""
    folder = tmp_path_factory.mktemp("knn") / "run"
    return untrained(folder, replace(config, data=replace(config.data, shards=str(tiny_shards))))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_vote_is_the_one_that_is_written_out(temperature: float) -> None:
    rng = np.random.default_rng(0)
    known, judged = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    labels = rng.integers(0, 3, 40)
    for k in (1, 7, 40):
        given = knn_predict(*map(torch.tensor, (judged, known, labels)), 3, [k], temperature, batch_size=4)[0]
        for row, found in zip(judged, given.tolist(), strict=True):
            cosine = known @ row / np.linalg.norm(known, axis=1) / np.linalg.norm(row)
            votes = [0.0, 0.0, 0.0]
            for i in np.argsort(-cosine)[:k]:
                votes[labels[i]] += math.exp(cosine[i] / temperature)
            assert found == int(np.argmax(votes))


def test_several_numbers_of_neighbours_are_each_what_they_are_alone() -> None:
    torch.manual_seed(0)
    known, judged, labels = torch.randn(30, 4), torch.randn(6, 4), torch.randint(0, 4, (30,))
    together = knn_predict(judged, known, labels, 4, [1, 5, 20], 0.07)
    for row, k in zip(together, (1, 5, 20), strict=True):
        assert torch.equal(row, knn_predict(judged, known, labels, 4, [k], 0.07)[0])


def test_a_models_autocast_leaves_the_vote_exact() -> None:
    """Two neighbours whose similarities bf16 cannot tell apart: the nearer one, the second, decides."""
    known = torch.tensor([[1.0, 0.003], [1.0, 0.001]])
    with torch.autocast("cpu", torch.bfloat16):
        given = knn_predict(torch.tensor([[1.0, 0.0]]), known, torch.tensor([0, 1]), 2, [1], 0.07)
    assert given.item() == 1


def test_known_images_are_their_own_nearest_neighbours() -> None:
    torch.manual_seed(0)
    known, labels = torch.randn(30, 4), torch.randint(0, 4, (30,))
    assert torch.equal(knn_predict(known, known, labels, 4, [1, 5], 0.07)[0], labels)


def test_more_neighbours_than_training_images_are_all_of_them(labelled_run: Path) -> None:
    result = evaluate("knn", KNNSettings(checkpoint=labelled_run, k=(5, 20, 100), train_images=12, val_images=6))
    assert list(result["accuracy"]["teacher"]) == ["5", "12"]
    assert result["notes"] == ["k = 12 instead of more neighbours: there are 12 training images"]


def test_a_real_run_is_judged_and_shown(labelled_run: Path) -> None:
    result = evaluate("knn", KNNSettings(checkpoint=labelled_run, k=(10, 20), train_images=60, val_images=20))
    assert (result["train_images"], result["val_images"]) == (60, 20)
    scores = result["accuracy"]["teacher"]
    assert list(scores) == ["10", "20"]
    assert all(0 <= score["mean"] <= 1 for score in scores.values())
    [table] = tables(result)
    assert len(table.rows) == 2
    assert "Nearest neighbours" in (labelled_run / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": (5, 5)}, "--k 5 5"),
        ({"temperature": 0.0}, "--temperature"),
        ({"label": "mood"}, "no label column 'mood'; it has .*; use another --label"),
        (
            {"data": EvalData(split="train")},
            "fitted and evaluated on the same images, split 'train'.*--data.split NAME",
        ),
        ({"train_images": 1}, "--train-images"),
    ],
)
def test_what_cannot_be_is_named_by_its_option(labelled_run: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate("knn", replace(KNNSettings(checkpoint=labelled_run, k=(10,)), **changes))
