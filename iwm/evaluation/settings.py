"""Options of the evaluators.

This module imports neither torch nor DALI, so that a command can read its options before these are imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dali_pipelines.augmentations import JITTER_OPS, OP_BY_NAME, JitterImpl, PhotometricConfig
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import ConfigError
from iwm.encoder_outputs import EncoderName
from iwm.ranges import Range

JITTER_SCENARIOS = tuple(name for name, views in SCENARIOS.items() if views.target.jitter_probability > 0)
"""Scenarios whose target has jitter, so that a bank can be sampled from it."""

JitterScenario = Annotated[str | None, tyro.conf.arg(metavar="|".join(JITTER_SCENARIOS))]

Distance = Literal["pooled", "per_token"]
"""Features that a distance is computed between: averaged over tokens, or all tokens."""

DISTANCES: tuple[Distance, ...] = ("pooled", "per_token")

MAX_VALUES = 7
"""Largest number of values per component of the explorer. A browser ranked 7⁴ actions in 1.1 s per image."""


@dataclass(frozen=True)
class EvalData:
    """Images that the model is evaluated on."""

    shards: str | None = None
    """Shard folder made by `iwm shards`, or its URL. Default: the run's own (data.shards)."""
    split: str | None = None
    """Split of that folder.
    Default: the run's validation split (data.val, or `val`); where there is none, its training split (data.train).
    Results on images that the model was trained on say so."""
    cache: Path | None = None
    """Local folder for shards of a URL. Default: the run's own (data.cache)."""


@dataclass(frozen=True)
class EvalSettings:
    """Options of every evaluator."""

    checkpoint: Path
    """Run folder, whose newest complete checkpoint is loaded, or one checkpoint file."""
    output: Path | None = None
    """JSON file to write; the images of its figures go into a zip next to it. Default: RUN/eval/NAME.json."""
    data: EvalData = field(default_factory=EvalData)
    seed: Annotated[int, Range(min=0)] = 0
    """Seed of all random values. With the same seed, all models are evaluated on the same views and actions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16`: autocast of the model; distances and ranks are not rounded. `auto`: the precision of the training.
    A model that was trained in fp8 runs in bf16."""


@dataclass(frozen=True)
class BankSize:
    """Size of the banks of augmented views in which predictions are ranked."""

    num_images: Annotated[int, Range(min=2)] = 64
    """Images, at least 2; all where the split has fewer. Each has its own bank; the standard error is over images."""
    num_views: Annotated[int, Range(min=2)] = 256
    """Jittered views per image, at least 2. Chance depends on it: compare only scores of the same bank size."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Views embedded and predicted at a time. Lower it when the device runs out of memory."""


@dataclass(frozen=True)
class BankSettings(BankSize):
    """Bank of augmented views in which predictions are ranked."""

    scenario: JitterScenario = None
    """Row of table S2 whose target jitter the bank is sampled from. Use the same one for all runs that you compare.
    Default: the run's own jitter, or that of `default` if the run has none."""


def bank_augmentation(views: Views, scenario: str | None = None, option: str = "--bank.scenario") -> PhotometricConfig:
    """Return the target's jitter at probability 1 and without destructive augmentations, for sampling a bank.

    At training's p = 0.8 a fifth of the bank would be the clean image itself, and ties would decide the score.
    Raises ConfigError, which names `option`, for an unknown scenario or one whose target has no jitter.
    """
    if scenario is not None and scenario not in JITTER_SCENARIOS:
        raise ConfigError(
            f"{option}: '{scenario}' is not a scenario with jitter; choose one of {', '.join(JITTER_SCENARIOS)}"
        )
    own = views.target if views.target.jitter_probability > 0 else SCENARIOS["default"].target
    target = own if scenario is None else SCENARIOS[scenario].target
    return replace(target.without_destructive(), jitter_probability=1.0)


def jitter_by_op(jitter: PhotometricConfig) -> dict[str, PhotometricConfig]:
    """Return, for each op that this jitter may apply, the jitter of that op alone."""
    still = jitter.with_fields({op.name: 0.0 for op in JITTER_OPS})
    return {op.name: still.with_fields({op.name: getattr(jitter, op.name)}) for op in JITTER_OPS if jitter.applies(op)}


@dataclass(frozen=True)
class MRRSettings(EvalSettings):
    """Mean reciprocal rank of predictions in a bank of augmented views (paper, section 4.1)."""

    bank: BankSettings = field(default_factory=BankSettings)
    jitter_impl: JitterImpl | None = None
    """Computation of the jitter of the bank's views: `linear` or `torchvision`.
    The action to a view is the same with both. Default: the run's own (views.jitter_impl)."""
    by_op: bool = False
    """Also measure each jitter op alone, in banks to which the others are not applied."""


@dataclass(frozen=True)
class RetrievalSettings(EvalSettings):
    """Figures of the views nearest to predictions, with the rank of the true view."""

    bank: BankSettings = field(default_factory=lambda: BankSettings(num_images=6))
    num_actions: Annotated[int, Range(min=1)] = 3
    """Random actions shown per image."""


@dataclass(frozen=True)
class SweepSettings(EvalSettings):
    """Retrieval along a grid of values, one parameter at a time."""

    num_images: Annotated[int, Range(min=2)] = 64
    """Images that the curves are averaged over, at least 2; all where the split has fewer."""
    num_values: Annotated[int, Range(min=2)] = 11
    """Values of brightness, contrast, saturation and hue over their range, at least 2."""
    num_sigmas: Annotated[int, Range(min=2)] = 6
    """Values of the blur's sigma, from 0 to the run's largest, at least 2."""
    scenario: JitterScenario = None
    """Row of table S2 whose target jitter gives the ranges.
    Default: the run's own jitter, or that of `default` if the run has none."""
    num_shown: Annotated[int, Range(min=0)] = 3
    """Images with a figure, sampled with the seed; 0: no figures."""
    distance: Distance = "pooled"
    """Features that are compared: `pooled`, averaged over tokens, or `per_token`."""
    encoder: EncoderName = "teacher"
    """Encoder of the source: `teacher` (target encoder) or `student` (context encoder)."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Views embedded and predicted at a time. Lower it when the device runs out of memory."""


@dataclass(frozen=True)
class CorruptionSettings(EvalSettings):
    """MRR from corrupted sources, by corruption and strength."""

    bank: BankSettings = field(default_factory=lambda: BankSettings(num_images=24))
    num_queries: Annotated[int, Range(min=2)] = 16
    """Views of each bank that are queried, 2 to --bank.num-views.
    The bank is random, so fewer queries only increase the variance."""
    blur_sigmas: Annotated[tuple[float, ...], Range(above=0)] = OP_BY_NAME["blur"].levels
    """Sigmas of the blur to undo, in pixels of the view."""
    strengths: Annotated[tuple[float, ...], Range(above=0, max=1)] = (0.5, 1.0)
    """Changes of brightness, contrast, saturation and hue to undo, as shares (0 to 1) of the bank's range."""
    num_shown: Annotated[int, Range(min=0)] = 4
    """Images in the figure, sampled with the seed. It shows each corruption at its greatest strength. 0: no figure."""
    distance: Distance = "pooled"
    """Features that are compared: `pooled`, averaged over tokens, or `per_token`."""
    encoder: EncoderName = "teacher"
    """Encoder of the source: `teacher` (target encoder) or `student` (context encoder)."""


@dataclass(frozen=True)
class ExplorerSettings(EvalSettings):
    """Data of the explorer on report.html: a grid of actions on a few images. Writes RUN/eval/explorer.*."""

    num_images: Annotated[int, Range(min=1)] = 6
    """Images, sampled with the seed; all where the split has fewer."""
    num_values: Annotated[int, Range(min=2, max=MAX_VALUES)] = 5
    """Values of each jitter component over its range, 2 to 7. The views are all combinations, num_values⁴."""
    scenario: JitterScenario = None
    """Row of table S2 whose target jitter the grid covers.
    Default: the run's own jitter, or that of `default` if the run has none."""
    blur_sigma: Annotated[float, Range(above=0)] = 1.0
    """Sigma of the blurred source, in pixels of the view."""
    explained_variance: Annotated[float, Range(above=0, max=1)] = 0.9995
    """Share of the squared distances, 0 to 1, that the stored PCA components explain."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Views embedded and predicted at a time. Lower it when the device runs out of memory."""


@dataclass(frozen=True)
class SimilaritySettings(EvalSettings):
    """Cosine similarity of augmented views within and between images."""

    num_images: Annotated[int, Range(min=2)] = 128
    """Images, at least 2; all where the split has fewer."""
    num_views: Annotated[int, Range(min=2)] = 16
    """Augmented views of each image, at least 2. The paper uses 16."""
    num_shown: Annotated[int, Range(min=1)] = 8
    """Images in the figure, the first of --num-images; all where there are fewer."""
    encoder: EncoderName = "teacher"
    """`teacher`: the target encoder. `student`: the context encoder."""
    scenario: JitterScenario = None
    """Row of table S2 whose source augmentations make the views. Use the same one for all runs that you compare.
    Default: the run's own source view, or that of `default` if the run has no jitter."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Views embedded at a time. Lower it when the device runs out of memory."""


@dataclass(frozen=True)
class LabelledImageSettings:
    """Options of evaluators that fit a classifier to labelled images. It needs a second split to be evaluated on."""

    label: str | None = None
    """Label column of the shards. Default: `label`."""
    train: str | None = None
    """Split that the classifier is fitted on. Default: the run's training split (data.train)."""
    train_images: Annotated[int | None, Range(min=2)] = None
    """Number of training images, the first of the split; all where it has fewer. None: all."""
    val_images: Annotated[int | None, Range(min=2)] = None
    """Number of held-out images, the first of the split; all where it has fewer. None: all."""


@dataclass(frozen=True)
class LinearSettings(LabelledImageSettings):
    """Data and L2 penalties of the linear classifier."""

    train_images: int | None = 256
    """Number of training images, the first of the split; all where it has fewer. None: all."""
    val_images: int | None = 128
    """Number of held-out images, the first of the split; all where it has fewer. None: all."""
    l2: Annotated[tuple[float, ...], Range(above=0)] = (1e-3, 1e-2, 1e-1, 1.0)
    """L2 penalties to select from, by accuracy on a fifth of the training images. The penalty is l2 / 2 · ‖weight‖²."""
    scratch: Path | None = None
    """Folder on a disk for the features, which are deleted in the end: images × (2 + values of N) × width × 4 bytes.
    Default: a folder beside the result. After an interruption the same command continues with what is there."""
    keep_features: bool = False
    """Keep the features, so that the same command with other penalties need not compute them again."""
    memory_gb: Annotated[float, Range(min=0)] = 4.0
    """Memory of the device for training features while a classifier is fitted (GB).
    What exceeds it is read from the disk in every iteration. All of ImageNet needs 4 GB at ViT-B's width."""


@dataclass(frozen=True)
class MarginalisationSettings(EvalSettings):
    """Retrieval and linear accuracy of means of N predictions."""

    predictions: Annotated[tuple[int, ...], Range(min=1)] = (1, 8, 16, 32, 128)
    """Values of N, the number of averaged predictions, in ascending order. The largest determines the cost."""
    bank: BankSettings = field(default_factory=lambda: BankSettings(num_images=24))
    nearest: Annotated[int, Range(min=1)] = 5
    """Number of nearest views whose jitter strength is averaged."""
    linear: bool = True
    """Fit and evaluate linear classifiers. They are left out where the shards have no labels or a single split."""
    probe: LinearSettings = field(default_factory=LinearSettings)


@dataclass(frozen=True)
class FeatureMapSettings(EvalSettings):
    """Attention and PCA maps of patch features."""

    num_images: Annotated[int, Range(min=1)] = 6
    """Images, sampled with the seed; all where the split has fewer."""
    keys: tuple[str, ...] = ()
    """Sample keys of the images to show, instead of random ones."""
    pca: Literal["together", "each"] = "together"
    """`together`: one PCA of all shown images, so that their colours are comparable. `each`: one PCA per image."""
    query: Annotated[tuple[float, float], Range(min=0, below=1)] = (0.5, 0.5)
    """Patch whose attention to the others is shown: y and x from the upper left corner, as shares of the image."""
    scenario: JitterScenario = None
    """Row of table S2 whose target jitter limits the action shown: least brightness, most of the other ops.
    Default: the run's own jitter, or that of `default` if the run has none."""


@dataclass(frozen=True)
class KNNSettings(LabelledImageSettings, EvalSettings):
    """Accuracy of k-nearest-neighbour classification with the features of both encoders."""

    k: Annotated[tuple[int, ...], Range(min=1)] = (10, 20, 100)
    """Numbers of neighbours, in ascending order; all training images where there are fewer."""
    temperature: Annotated[float, Range(above=0)] = 0.07
    """Temperature of the votes, above 0. With a small value the nearest neighbours decide."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Held-out images compared with all training images at a time. Lower it when the device runs out of memory."""


@dataclass(frozen=True)
class WorldModelSettings(EvalSettings):
    """Run all evaluators of the world model (mrr to knn) one after another, with their default options.

    What the data do not allow (labels, a second split) is left out and named. Writes RUN/eval/world-model.json.
    """

    output: tyro.conf.Suppress[None] = None
    """Each evaluator writes its own file in RUN/eval."""
    label: str | None = None
    """Label column for the evaluators that need labels: `marginalisation` (linear accuracy) and `knn`.
    Default: `label`."""
