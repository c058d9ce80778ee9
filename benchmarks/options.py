"""Options of the modes of throughput.py, and their defaults, which depend on the recipe and on the GPU."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from environment import BenchmarkError, has_gpu, lookup
from synthetic_data import GENERATED

from dali_pipelines.augmentations import JitterImpl, ViewBackend
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config, PipelineBackend
from iwm.ranges import Range, check_ranges
from iwm.recipes import RECIPES, with_scenario

Device = Literal["cpu", "cuda"]

Baseline = Literal["torchvision", "webdataset", "ffcv", "decode"]


GPU_RECIPE = "iwm_b16_equi_18x384"
"""Default recipe on a GPU."""

BATCH_EACH = 256
"""Default maximum batch size per process (images): an eighth of the paper recipes' 2,048."""


@dataclass(frozen=True)
class StepOptions:
    """Options of the modes that run training steps."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe. Default: iwm_b16_equi_18x384 on a GPU, else demo, with at most 256 images per step on each process."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 that replaces the recipe's photometric augmentations."""
    shards: Path | None = None
    """Folder of shards (short for --data.shards). None: generate shards in data/benchmark.
    These have 1,200 JPEGs of 500×375, cut from scikit-image's photographs."""
    seconds: Annotated[float, Range(above=0)] = 60.0
    """Measured time of each mode over all turns (seconds), with at least five steps per turn.
    The default is 60 on a GPU, else 6."""
    repeats: Annotated[int, Range(min=1)] = 3
    """Number of turns. Each turn measures every mode once."""
    warmup: Annotated[int, Range(min=1)] = 30
    """Number of steps before the measurements. The first one includes compilation."""
    json: Path | None = None
    """File for all results (JSON)."""
    profile: Path | None = None
    """Folder for a torch profiler trace of a few steps, readable by Chrome and Perfetto."""

    def check(self) -> None:
        """Raise ConfigError for invalid options."""
        self.config.check()
        check_ranges(self)


@dataclass(frozen=True)
class ModelOptions(StepOptions):
    """Training steps on resident batches, each with its own masks."""

    baselines: bool = False
    """Also measure a plain eager step, and a step written as in I-JEPA's public code."""


@dataclass(frozen=True)
class EndToEndOptions(StepOptions):
    """Training with pipeline and model, as iwm/train.py runs them."""


@dataclass(frozen=True)
class InterferenceOptions(StepOptions):
    """Training steps on resident batches, without and with the pipeline running concurrently."""


@dataclass(frozen=True)
class AllOptions(StepOptions):
    """Pipeline, model, interference and end-to-end in turns: rates, ratios and the bottleneck; also baselines."""

    baselines: bool = True
    """Also measure each operator of the pipeline, JPEG decoding alone, and torchvision's loader."""
    plot: Path | None = None
    """File for a plot of each stage against its limit (.png or .svg)."""

    def check(self) -> None:
        super().check()
        if self.plot is not None and self.plot.suffix not in (".png", ".svg"):
            raise BenchmarkError(f"--plot {self.plot}: the name must end in .png or .svg")


@dataclass(frozen=True)
class ScalingOptions(StepOptions):
    """Weak scaling, under torchrun: images/s of N processes relative to N times one, and the all-reduce's cost."""

    images: Annotated[int | None, Range(min=1)] = None
    """Batch size per process, for any number of processes. None: --data.global-batch-size, at most 256."""


@dataclass(frozen=True)
class LoaderOptions:
    """Images per second of the data pipeline alone.

    The loaders are measured in turns, each in its own process, on the same number of cores and the same JPEGs.
    """

    recipe: str | None = None
    """Recipe whose views are measured (iwm/recipes.py). None: the paper's views, A.1."""
    scenario: str | None = None
    """Row of table S2 that replaces the recipe's photometric augmentations."""
    size: Annotated[int | None, Range(min=1)] = None
    """Side of the views (pixels). None: the recipe's."""
    colour: JitterImpl | None = None
    """Implementation of the colour jitter. None: the recipe's."""
    shards: Path | None = None
    """Folder of shards. None: generate 1,200 JPEGs of 500×375 in data/benchmark, from scikit-image's photographs."""
    split: str = "train"
    """Split of the shards."""
    baseline: tuple[Literal[Baseline, "all", "none"], ...] = ("torchvision",)
    """One or several baselines. `torchvision`: DataLoader and transforms v2, on Pillow images and on tensors.
    `webdataset`: its own loader with the same transforms.
    `ffcv`: without hue, grayscale, blur and solarize, which it lacks.
    `decode`: JPEG decoding alone, the limit. `all`: all installed ones. `none`: DALI alone."""
    device: Device = "cpu"
    """Device of the DALI pipeline; baselines run on the CPU."""
    backend: PipelineBackend = "auto"
    """Backend of the DALI pipeline, as data.backend of iwm/train.py."""
    cores: Annotated[int, Range(min=1)] = 1
    """CPU cores that each loader is pinned to, and number of its worker threads or processes."""
    batch_size: Annotated[int, Range(min=1)] = 64
    """Batch size (images)."""
    seconds: Annotated[float, Range(above=0)] = 10.0
    """Duration of one measurement (seconds), without the warm-up, which takes a fifth more."""
    repeats: Annotated[int, Range(min=1)] = 3
    """Number of measurements of each loader."""
    json: Path | None = None
    """File for all results (JSON)."""


@dataclass(frozen=True)
class TuneOptions:
    """Find the pipeline's settings for this machine and print them as options of iwm/train.py.

    The machine should be idle otherwise.
    """

    recipe: str | None = None
    """Recipe whose views and batch size are used (iwm/recipes.py). None: the paper's, A.1."""
    scenario: str | None = None
    """Row of table S2 that replaces the recipe's photometric augmentations."""
    shards: Path | None = None
    """Folder of shards. None: the recipe's; without a recipe, generated shards as in mode `data`."""
    split: str = "train"
    """Split of the shards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the pipeline."""
    batch_size: Annotated[int | None, Range(min=1)] = None
    """Batch size per process (images). None: the recipe's, divided by the processes, at most 256 (64 on a CPU)."""
    processes: Annotated[int, Range(min=1)] = 1
    """Number of training processes that will share this machine's cores (one per GPU)."""
    backends: tuple[ViewBackend, ...] = ("gpu", "triton", "cpu")
    """On a GPU: backends that are compared by the speed of training, in order of preference.
    `gpu` and `triton` are measured with nvJPEG's kernels, with the JPEG engine too, and with decoding on CPU cores."""
    seconds: Annotated[float, Range(above=0)] = 1.0
    """Duration of one measurement (seconds)."""
    repeats: Annotated[int, Range(min=1)] = 5
    """Number of measurements of each candidate."""
    json: Path | None = None
    """File for all results (JSON)."""


@dataclass(frozen=True)
class DownstreamRateOptions:
    """Training rate and memory of each downstream protocol at its own settings, and the rate of its pipeline alone."""

    recipe: str | None = None
    """Recipe of the encoder and predictor. None: iwm_b16_equi_18x384 on a GPU, else demo."""
    protocols: tuple[str, ...] = ()
    """Protocols to measure (iwm/evaluate.py --help lists them). None: all."""
    shards: Path | None = None
    """Folder of shards with labels and, for segmentation, masks. None: generated ones, in data/benchmark."""
    train: str = "train"
    """Training split of the shards."""
    val: str = "val"
    """Held-out split of the shards."""
    label: str = "label"
    """Label column of the shards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model and of the first pipeline."""
    batch_size: Annotated[int, Range(min=1)] = 1024
    """Maximum number of images per step. The rate depends on the images of a pass, which the protocol chooses."""
    steps: Annotated[int, Range(min=2)] = 12
    """Number of training steps, of which the second half is counted."""
    seconds: Annotated[float, Range(above=0)] = 3.0
    """Duration of the measurement of each pipeline (seconds)."""
    json: Path | None = None
    """File for all results (JSON)."""


@dataclass(frozen=True)
class TrafficOptions:
    """Kernels, memory traffic and FLOPs of a compiled training step, counted without a GPU; estimated time.

    Rates that are not given are measured on a GPU; without one they are assumed.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe. Default: iwm_b16_equi_18x384."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 that replaces the recipe's photometric augmentations."""
    batch_size: Annotated[int, Range(min=1)] = BATCH_EACH
    """Number of images in the step, which is one pass on one GPU."""
    kernels: bool = True
    """Print every kernel of every compiled part, besides the sums."""
    gemm_tflops: Annotated[float | None, Range(above=0)] = None
    """Rate of matrix products (TFLOP/s)."""
    attention_tflops: Annotated[float | None, Range(above=0)] = None
    """Rate of attention kernels (TFLOP/s)."""
    bandwidth: Annotated[float | None, Range(above=0)] = None
    """Rate of memory traffic (TB/s)."""
    peak_tflops: Annotated[float | None, Range(above=0)] = None
    """Rate that is 100% MFU (TFLOP/s)."""
    gap_us: Annotated[float | None, Range(min=0)] = None
    """Time between two kernels (µs). It is never measured."""
    json: Path | None = None
    """File for all results (JSON)."""

    def check(self) -> None:
        """Raise ConfigError for invalid options."""
        self.config.check()
        check_ranges(self)


@dataclass(frozen=True)
class IjepaParityOptions:
    """Options of the mode ijepa-parity."""

    recipes: tuple[Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))], ...] = (
        "ijepa_official_b16",
        "ijepa_b16_12x384",
    )
    """Recipes to compare, with patches of 16 px."""
    steps: Annotated[int, Range(min=2)] = 400
    """Number of batches of 128 images whose masks are counted."""
    json: Path | None = None
    """File for all figures (JSON)."""


def settings_of(options: Any) -> dict[str, Any]:
    """Return a mode's options for JSON: paths as strings."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def chosen_views(recipe: str | None, scenario: str | None, size: int | None, colour: JitterImpl | None) -> Views:
    """Return a recipe's views with the given changes; without a recipe, the paper's.

    Raises BenchmarkError where the recipe or scenario does not exist.
    """
    views = lookup("--recipe", recipe, RECIPES)().views if recipe else Views()
    if scenario:
        row = lookup("--scenario", scenario, SCENARIOS)
        views = replace(views, source=row.source, target=row.target)
    return replace(views, size=size or views.size, jitter_impl=colour or views.jitter_impl)


StepOptionsT = TypeVar("StepOptionsT", bound=StepOptions)


def default_options(kind: type[StepOptionsT], arguments: Sequence[str]) -> StepOptionsT:
    """Return a mode's default options for the given recipe, scenario and shards; other arguments override fields later.

    Raises BenchmarkError where the recipe or scenario does not exist.
    """
    gpu = has_gpu()
    chosen, config = _chosen(arguments, GPU_RECIPE if gpu else "demo")
    most = BATCH_EACH * int(os.environ.get("WORLD_SIZE", 1))
    data = replace(
        config.data,
        shards=str(chosen.shards or GENERATED / "shards"),
        global_batch_size=min(config.data.global_batch_size, most),
        val=None,
    )
    return kind(
        replace(config, data=data),
        recipe=chosen.recipe,
        scenario=chosen.scenario,
        shards=chosen.shards,
        seconds=60.0 if gpu else 6.0,
    )


def traffic_options(arguments: Sequence[str]) -> TrafficOptions:
    """Return mode traffic's default options as `default_options` does. Raises BenchmarkError as it does."""
    chosen, config = _chosen(arguments, GPU_RECIPE)
    return TrafficOptions(config, recipe=chosen.recipe, scenario=chosen.scenario)


def _chosen(arguments: Sequence[str], recipe: str) -> tuple[Namespace, Config]:
    """Return the given recipe, scenario and shards, and the configuration of recipe and scenario."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=recipe)
    first.add_argument("--scenario")
    first.add_argument("--shards", type=Path)
    chosen = first.parse_known_args(arguments)[0]
    config = lookup("--recipe", chosen.recipe, RECIPES)()
    if chosen.scenario is not None:
        lookup("--scenario", chosen.scenario, SCENARIOS)
        config = with_scenario(config, chosen.scenario)
    return chosen, config
