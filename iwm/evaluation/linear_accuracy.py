"""Linear accuracy of pooled features of labelled images, with the memory of a batch and a chunk for any number of them.

One ordered pass over each split writes the features to files (feature_store.py), from which the classifiers
(logistic_regression.py) read them chunk by chunk. An interrupted pass continues: images that are done are decoded
again, but not embedded.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from iwm.config import ConfigError
from iwm.evaluation.common import READ_BATCH_SIZE, EvalContext, proportion_stderr
from iwm.evaluation.feature_store import FeatureStore, WrittenPart
from iwm.evaluation.features import LabelledSplits, find_splits
from iwm.evaluation.held_out import MissingDataError, require_images
from iwm.evaluation.logistic_regression import Samples, fit_with_validation
from iwm.evaluation.settings import LinearSettings
from iwm.training.checkpoint import file_digest
from iwm.training.train_state import run_lock
from shards.format import load_manifest

OPTIONS = "--probe."
SAVE_EVERY = 4096
"""Images after which those that are done are recorded. An interruption costs at most these."""
WORTH_SAYING = 100e6
"""Bytes of features from which on their size is printed."""


@dataclass(frozen=True)
class PooledFeatures:
    """Kinds of features of an image: their names, and the function that computes them."""

    names: Sequence[str]
    compute: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]]
    """From a batch of images to features of every kind, s = number of names."""
    generator: torch.Generator | None = None
    """Random generator that `compute` draws from, image by image."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Settings that the features depend on besides checkpoint and images, in types of JSON."""


def linear_accuracy(
    context: EvalContext, settings: LinearSettings, features: PooledFeatures, seed: int, folder: Path
) -> dict[str, Any]:
    """Compute the top-1 accuracy (0 to 1) of a linear classifier on each kind of features.

    folder: for the files of features while they are needed; --probe.scratch replaces it. Returns label, classes, chance
    (share of the majority class among held-out images), train_images, val_images, and for each kind: mean,
    standard_error (over images), l2, iterations, gradient. Raises ConfigError, which names the option, for invalid
    settings or labels and a disk without room, MissingDataError where the data lack labels or a second split.
    """
    if not settings.l2:
        raise ConfigError(f"{OPTIONS}l2: name at least one penalty")
    try:
        splits = find_splits(context, settings, OPTIONS)
    except MissingDataError:
        raise
    except ConfigError as error:
        raise ConfigError(f"linear accuracy: {error}, or use --no-linear") from error
    if settings.scratch is not None:
        folder = settings.scratch / f"{context.run.resolve().name}-{folder.name}"
    with run_lock(folder, f"{OPTIONS}scratch"):
        try:
            result = _accuracies(context, settings, features, splits, seed, folder)
        except MissingDataError:
            shutil.rmtree(folder)
            raise
        if not settings.keep_features:
            shutil.rmtree(folder)
    return result


def _accuracies(
    context: EvalContext,
    settings: LinearSettings,
    features: PooledFeatures,
    splits: LabelledSplits,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    train = _store(context, settings.train_images, features, splits, splits.train, folder)
    labels = train.labels().to(context.device)
    splits.require_classes(labels, OPTIONS)
    test = _store(context, settings.val_images, features, splits, splits.held_out, folder)
    numbers = test.labels().to(context.device)
    accuracies = {}
    memory = int(settings.memory_gb * 1e9)
    for name in track(features.names, "linear classifiers", transient=True):
        fitted_on = Samples(train.chunks(name, context.device, memory), labels)
        classifier = fit_with_validation(fitted_on, len(splits.classes), settings.l2, seed)
        accuracy = classifier.accuracy(Samples(test.chunks(name, context.device, 0), splits.targets(numbers)))
        accuracies[name] = {
            "mean": accuracy,
            "standard_error": proportion_stderr(accuracy, len(numbers)),
            "l2": classifier.l2,
            "iterations": classifier.iterations,
            "gradient": classifier.gradient,
        }
    return {**splits.metadata(labels, numbers), "accuracy": accuracies}


@torch.no_grad()
def _store(
    context: EvalContext,
    most: int | None,
    features: PooledFeatures,
    splits: LabelledSplits,
    split: str,
    folder: Path,
) -> FeatureStore:
    """Return the features of the first `most` images of a split (None: all), computed where they are not there yet."""
    manifest = load_manifest(context.data.shards, split)
    images = manifest.samples if most is None else min(most, manifest.samples)
    require_images(images, 2, context.data.shards, split)
    identity = {
        **features.identity,
        "checkpoint": f"{context.checkpoint.name} {file_digest(context.checkpoint)}",
        "shards": manifest.fingerprint,
        "label": splits.label,
        "device": context.device.type,
        "random": hashlib.sha256(_state_of(features.generator).encode()).hexdigest(),
    }
    store = FeatureStore(folder / split, features.names, images, identity)
    done = store.written.images
    if done:
        _say(f"split '{split}': features of {done:,} of {images:,} images are in {folder}")
        if features.generator is not None:
            state = bytes.fromhex(store.written.random_state)
            features.generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    if done < images:
        _compute(context, most, features, splits.label, split, store)
    context.note_fewer(images, most, split, "labelled images")
    return store


def _compute(
    context: EvalContext, most: int | None, features: PooledFeatures, label: str, split: str, store: FeatureStore
) -> None:
    """Write the features of the images that the store lacks."""
    begin = saved = store.written.images
    seen = 0
    batches = -(-store.images // min(store.images, READ_BATCH_SIZE))
    reading = context.iter_labelled(split, label, most)
    for batch in track(reading, f"features of {split}", total=batches, transient=True):
        assert batch.labels is not None  # the loader was given a label column
        there = min(max(begin - seen, 0), len(batch.images))
        first = seen <= begin < seen + len(batch.images)
        seen += len(batch.images)
        if there == len(batch.images):
            continue
        found = features.compute(batch.images[there:])
        if first:
            _announce(store, found.shape[2], split)
        store.append(found, batch.labels[there:])
        if seen - saved >= SAVE_EVERY or seen == store.images:
            store.save(WrittenPart(seen, found.shape[2], _state_of(features.generator)))
            saved = seen


def _announce(store: FeatureStore, width: int, split: str) -> None:
    """Print the size of large files before they are written. Raises ConfigError where the disk has no room for them."""
    size = store.bytes_needed(width)
    if size >= WORTH_SAYING:
        _say(f"split '{split}': features of {store.images:,} images, {size / 1e9:.1f} GB in {store.folder}")
    store.require_space(width, f"{OPTIONS}scratch")


def _state_of(generator: torch.Generator | None) -> str:
    return "" if generator is None else generator.get_state().numpy().tobytes().hex()


def _say(text: str) -> None:
    Console(emoji=False).print(text, soft_wrap=True, markup=False)
