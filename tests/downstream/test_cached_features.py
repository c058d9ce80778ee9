"""Cached features are those of the centre crops, each once per epoch; accuracies are those of numpy."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from iwm.config import Config
from iwm.downstream.cached_features import CachedFeatures
from iwm.downstream.study import FrozenEncoders, Study
from iwm.downstream.tasks import Classes, LabelColumn, accuracies, classes_of
from iwm.downstream.trials import Probe
from iwm.models.backbone import Backbone, frozen_backbone
from iwm.models.heads import LinearHead
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from shards.format import Column as Manifested
from shards.format import load_manifest, save_manifest
from tests.training.runs import alone

NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def teacher(small: Config) -> Backbone:
    torch.manual_seed(0)
    return frozen_backbone(WorldModel(small).target_encoder)


@pytest.fixture
def keep(boxes: Path, teacher: Backbone) -> Callable[..., CachedFeatures]:
    def kept(
        batch_size: int = 25, seed: int = 0, label_smoothing: float = 0.0, dist: DistEnv | None = None
    ) -> CachedFeatures:
        dist = dist or alone()
        loading = {
            "device": "cpu",
            "rank": dist.rank,
            "world_size": dist.size,
            "num_threads": 1,
            "prefetch_queue_depth": 2,
        }
        return CachedFeatures(
            LabelColumn("label", boxes, "train", "val", "label", 32),
            FrozenEncoders({"teacher": teacher}),
            batch_size=batch_size,
            label_smoothing=label_smoothing,
            seed=seed,
            dist=dist,
            loading=loading,
            bf16=False,
        )

    return kept


def by_pillow(boxes: Path, teacher: Backbone) -> tuple[Tensor, Tensor]:
    """Return the features of the training split's centre crops, by Pillow and torchvision, and labels."""
    crops, labels = [], []
    for path in sorted(boxes.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                component = member.name.partition(".")[2]
                if component == "jpg":
                    image = tv.pil_to_tensor(Image.open(io.BytesIO(file.read())))
                    crops.append(tv.center_crop(tv.resize(image, [37], antialias=True), [32]))
                elif component == "cls":
                    labels.append(int(file.read()))
    with torch.no_grad():
        return teacher.tokens(torch.stack(crops).permute(0, 2, 3, 1)), torch.tensor(labels)


def places(features: Tensor, among: Tensor) -> list[int]:
    """Return the index in `among` of each row."""
    nearest: list[int] = torch.cdist(features.flatten(1), among.flatten(1)).argmin(1).tolist()
    return nearest


def row_of(task: CachedFeatures, numbers: range) -> Tensor:
    return torch.cat([task.get_batch(number)[0]["teacher"] for number in numbers])


def test_features_are_those_of_the_centre_crops_with_their_classes(
    keep: Callable[..., CachedFeatures], boxes: Path, teacher: Backbone
) -> None:
    expected, labels = by_pillow(boxes, teacher)
    task = keep(batch_size=120, label_smoothing=0.3)
    shared, targets = task.get_batch(0)
    found = places(shared["teacher"], expected)
    assert sorted(found) == list(range(120))
    error = (shared["teacher"] - expected[found]).norm() / expected.norm()
    assert error < 0.02, "the crops are others than torchvision's"
    assert task.classes.names == NAMES
    one_hot = torch.eye(3)[labels[found]]
    torch.testing.assert_close(targets, 0.7 * one_hot + 0.1)
    assert task.images == 120


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(
    keep: Callable[..., CachedFeatures], boxes: Path, teacher: Backbone
) -> None:
    """24 batches of 25 are 5 epochs of 120: batches continue from one epoch into the next."""
    among, _ = by_pillow(boxes, teacher)
    orders = [places(row_of(keep(seed=seed), range(24)), among) for seed in (0, 1)]
    epochs = [order[first : first + 120] for order in orders for first in range(0, 600, 120)]
    assert all(sorted(epoch) == list(range(120)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_processes_keep_a_share_each_and_have_orders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, keep: Callable[..., CachedFeatures], boxes: Path, teacher: Backbone
) -> None:
    monkeypatch.setattr(DistEnv, "sum", lambda self, values: values * self.size)
    among, _ = by_pillow(boxes, teacher)
    shares = [
        places(row_of(keep(batch_size=20, dist=replace(alone(), rank=rank, size=2)), range(3)), among)
        for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(120))
    first = min(shares[1])
    assert shares[0] != [place - first for place in shares[1]]


def test_a_batchs_number_is_all_that_is_needed_to_go_on(keep: Callable[..., CachedFeatures]) -> None:
    went, begins = keep(), keep()
    row_of(went, range(7))
    for one, other in zip(went.get_batch(7), begins.get_batch(7), strict=True):
        assert torch.equal(*(value["teacher"] if isinstance(value, dict) else value for value in (one, other)))


@pytest.mark.parametrize("classes", [3, 9])
def test_accuracies_are_numpys_and_a_class_that_was_not_learnt_is_never_right(classes: int) -> None:
    """The held-out split has another order of classes, and its last class is not in the training split."""
    torch.manual_seed(classes)
    trials = {name: Probe(LinearHead(16, classes, std=1.0), "teacher") for name in ("one", "other")}
    study = Study(trials, FrozenEncoders({}), seeds=[0, 0]).eval()
    train_index = torch.cat((torch.randperm(classes), torch.tensor([-1])))
    features, labels = torch.randn(101, 4, 16), torch.randint(0, classes + 1, (101,))
    parts = (({"teacher": features[at]}, labels[at]) for at in torch.arange(101).split(10))
    named = Classes([str(number) for number in range(classes)], train_index)
    scores, facts = accuracies(study, 0, [0, 1], parts, named, alone())

    truth = train_index.numpy()[labels.numpy()]
    for trial, score in zip(trials.values(), scores, strict=True):
        layer = trial.head.fc
        logits = features.mean(1).numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        ranks = np.argsort(-logits, axis=1)
        assert score["top1"] == np.mean(ranks[:, 0] == truth)
        assert score["top5"] == np.mean((ranks[:, :5] == truth[:, None]).any(1))
    assert facts["val_images"] == 101
    assert facts["chance"] == np.bincount(labels.numpy()).max() / 101


def test_splits_that_number_classes_otherwise_are_matched_by_name(boxes: Path, tmp_path: Path) -> None:
    """Shards from different runs of make_shards may have different orders; within one folder the order is the same."""
    for split, names in (("train", ["blue", "red", "green"]), ("val", ["yellow", "green", "red"])):
        manifest = load_manifest(boxes, split)
        save_manifest(tmp_path, replace(manifest, columns=[Manifested("label", "cls", names)]))
    names, train_index = classes_of(LabelColumn("label", tmp_path, "train", "val", "label", 32), alone())
    assert names == ["blue", "red", "green"]
    assert train_index.tolist() == [-1, 2, 1]


def test_training_on_kept_features_says_what_it_is_of(leverage: Callable[..., Any], run: Path) -> None:
    result = leverage("finetune-predictor", cache_features=True, steps=2)
    assert (result["train_images"], result["val_images"], result["classes"]) == (120, 48, 3)
    assert result["epochs"] == pytest.approx(2 * 20 / 120, abs=1e-3)
