"""The whole configuration of a run: typed, printable, storable, and refused where it makes no sense.

A recipe (iwm/recipes.py) is a function that returns a `Config`; the command line overrides single fields; what results
is stored in the run's folder and in every checkpoint. Sections of the paper are named beside the values it fixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from cattrs import ClassValidationError, transform_error
from cattrs.preconf.pyyaml import make_converter

from dali_pipelines.augmentation import Views
from dali_pipelines.decoder import GPU_DECODER


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field and the remedy."""


@dataclass(frozen=True)
class Data:
    """Where images come from and how many make a step."""

    shards: Path = Path("shards/imagenet")
    """Folder made by tools/make_shards.py."""
    train: str = "train"
    """Split that is trained on."""
    val: str | None = "val"
    """Split that health is watched on; None: health is not watched."""
    batch: int = 2048
    """Images per optimiser step, over all processes (the paper gives none; I-JEPA's)."""
    micro_batch: int | None = None
    """Most images per process in one pass; the rest is accumulated. None: the whole share of a process in one pass."""
    threads: int = 0
    """CPU threads of each process's pipeline; 0: the cores that may be used, shared by the machine's processes, less
    two for torch's operators where the model is on a GPU."""
    prefetch: int = 2
    """Batches prepared ahead."""
    hw_decoder_load: float = GPU_DECODER.hw_load
    """On a GPU: share of the images, 0 to 1, that its JPEG engine decodes; the rest goes to nvJPEG's kernels."""
    decoder_width_hint: int = GPU_DECODER.width_hint
    """On a GPU: width in pixels that the JPEG engine gets memory for in advance; wider images cost a reallocation."""
    decoder_height_hint: int = GPU_DECODER.height_hint
    """The same of the height. `benchmarks/throughput.py tune` measures these five and writes a file for --tuned."""


@dataclass(frozen=True)
class Encoder:
    """The ViT of context and target encoder. Defaults: ViT-B/16 (A.1)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    """Side of a patch in pixels."""
    mlp_ratio: float = 4.0
    init: Literal["ijepa", "xavier"] = "ijepa"
    """`ijepa`: truncated normal 0.02, rescaled by depth. `xavier`: better for narrow models (width under about 256)."""


@dataclass(frozen=True)
class Predictor:
    """The world model: IWM(depth, width) (section 4.2). Defaults: IWM 18×384."""

    width: int = 384
    depth: int = 18
    heads: int = 12
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class Action:
    """What the predictor is told of the change from source to target (sections 4.1, 4.2; A.1)."""

    conditioning: Literal["none", "sequence", "feature"] = "feature"
    """`feature`: mixed into the mask tokens by three fully-connected layers. `sequence`: one token per component."""
    jitter: Literal["difference", "log_ratio"] = "difference"
    """`difference`: target − source, the paper's. `log_ratio`: log of the factors' ratio (hue: difference)."""


@dataclass(frozen=True)
class Masking:
    """Which patches the source loses and the predictor restores (A.1)."""

    kind: Literal["iwm", "ijepa"] = "iwm"
    """`iwm`: the union of the blocks is dropped and predicted in one pass. `ijepa`: each block is predicted separately,
    from a context block that excludes all of them."""
    blocks: int = 4
    area: tuple[float, float] = (0.15, 0.2)
    """Share of the image that one block covers."""
    aspect: tuple[float, float] = (0.75, 1.5)
    """Height / width of a block."""
    context_area: tuple[float, float] = (0.85, 1.0)
    """Share of the image that I-JEPA's square context block covers, before the target blocks are taken out."""


@dataclass(frozen=True)
class Loss:
    """Distance between prediction and target features (section 3)."""

    kind: Literal["l2", "smooth_l1"] = "l2"
    """`l2`: squared distance. `smooth_l1`: I-JEPA's."""
    predict: Literal["masked", "all"] = "masked"
    """`masked`: the dropped patches (figure S1). `all`: every patch of the target (the formula read literally)."""
    target_norm: bool = True
    """Layer-norm (no affine) of the target features, I-JEPA's; False: features as they are."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the predicted tokens of an image: mean, or the paper's sum. Over features and images always the mean."""


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedules (A.1; values the paper leaves open are I-JEPA's)."""

    kernels: Literal["auto", "apex", "torch"] = "auto"
    """`apex`: FusedAdam, needs apex built with its CUDA kernels. `auto`: apex where present, else torch's AdamW."""
    lr: float = 1e-3
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    """Cosine from weight_decay to here; biases, norms, positions and single tokens are never decayed."""
    clip: float | None = None
    """Largest global gradient norm; None: not clipped, as in the paper."""
    ema: float = 0.996
    final_ema: float = 1.0
    """Momentum of the target encoder, linear between the two."""


@dataclass(frozen=True)
class Schedule:
    """How long, and how the schedules are laid over it (A.1)."""

    epochs: float = 300.0
    warmup_epochs: float = 40.0
    stretch: float = 1.25
    """Schedules are made this much longer than the run, so training ends before their end."""
    steps: int | None = None
    """Optimiser steps in all; replaces epochs, with the warm-up's share of the run unchanged."""


AttentionKind = Literal["auto", "triton", "fused", "plain"]
ResidualKind = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Train:
    """How the step is computed."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """Threads of torch's CPU operators in each process; 0: its share of the machine's cores, with a GPU 2. On a CPU
    small models are faster with 1, for their operators are too short to divide, and the pipeline has the other
    cores."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16`: autocast; parameters, optimiser and EMA stay float32."""
    compile: bool = True
    """torch.compile each block of encoders and predictor."""
    attention: AttentionKind = "auto"
    """`triton`: the project's own kernels for bf16 sequences of at most 256 tokens on a GPU, else as `fused`. `fused`:
    scaled_dot_product_attention. `plain`: matmul, softmax, matmul; faster on a CPU. `auto`: `triton` on a Hopper GPU,
    which they were measured on, `fused` on another GPU, `plain` on a CPU."""
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: much less memory, a third more
    work. For ViT-L and larger batches."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share a model. `ddp`: each has all of it. `fsdp`: parameters, gradients and moments are
    divided (FSDP2), for encoders that do not fit otherwise."""
    residual: ResidualKind = "auto"
    """Precision of the residual stream under bf16 autocast. `bf16`: fewer bytes, a faster step. `fp32`: I-JEPA's code.
    `auto`: bf16 on a GPU, fp32 on a CPU."""
    cuda_graph: bool = True
    """On a GPU: capture the forward and backward passes of a compiled step as one CUDA graph and replay it. On several
    processes the step is taken kernel by kernel."""
    priority_stream: bool = True
    """On a GPU: run the step on a CUDA stream of higher priority than the pipeline's."""
    nonfinite_limit: int = 10
    """Steps in a row with a non-finite gradient before the run stops; each such step is skipped and counted."""
    deterministic: bool = False
    """Deterministic kernels on a GPU (slower), for exact resume there; a CPU run is deterministic anyway."""


@dataclass(frozen=True)
class Log:
    """What is written down, and how often (in optimiser steps)."""

    every: int = 50
    """Steps between two lines of metrics.jsonl; the device is read only then."""
    checkpoint_every: int = 1000
    keep: int = 2
    """Checkpoints kept beside the newest ones of `milestone_every`."""
    milestone_every: int | None = None
    """Steps between checkpoints that are never deleted."""
    health_every: int = 1000
    """Steps between two measurements of MRR, feature deviation and RankMe on held-out images."""
    health_images: int = 16
    health_bank: int = 64
    """Augmented views per image of the small bank; the reported MRR uses 256 (iwm/evaluate.py mrr)."""
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    encoder: Encoder = field(default_factory=Encoder)
    predictor: Predictor = field(default_factory=Predictor)
    action: Action = field(default_factory=Action)
    masking: Masking = field(default_factory=Masking)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)

    @property
    def grid(self) -> int:
        """Patches along one side of a view."""
        return self.views.size // self.encoder.patch

    def check(self) -> None:
        """Raise ConfigError where fields contradict each other."""
        c = self
        _need(
            c.views.size % c.encoder.patch == 0,
            f"views.size {c.views.size} is not a multiple of encoder.patch {c.encoder.patch}",
        )
        for name, width, heads in (
            ("encoder", c.encoder.width, c.encoder.heads),
            ("predictor", c.predictor.width, c.predictor.heads),
        ):
            _need(width % heads == 0, f"{name}.width {width} is not a multiple of {name}.heads {heads}")
            _need(width % 4 == 0, f"{name}.width {width} is not a multiple of 4, which 2-D sin-cos positions need")
        _need(c.grid >= 3, f"a grid of {c.grid}×{c.grid} patches is too small to mask: enlarge views.size")
        _need(
            c.masking.kind == "iwm" or c.loss.predict == "masked",
            "loss.predict all needs masking.kind iwm: I-JEPA predicts its blocks",
        )
        _need(
            c.masking.kind == "iwm" or c.masking.blocks * c.masking.area[1] < c.masking.context_area[0],
            "masking: the ijepa target blocks can cover the whole context block; lower blocks or area",
        )
        _need(c.masking.blocks >= 1 and 0 < c.masking.area[0] <= c.masking.area[1] < 1, "masking.area is no share")
        _need(
            c.train.parallel == "ddp" or c.optim.kernels != "apex",
            "optim.kernels apex cannot work on divided parameters; use --optim.kernels auto with --train.parallel fsdp",
        )
        _need(c.train.threads >= 0, f"train.threads {c.train.threads} must be positive (or 0, for all cores)")
        _need(c.data.batch >= 1, f"data.batch {c.data.batch} must be positive")
        _need(c.data.threads >= 0, f"data.threads {c.data.threads} must be positive (or 0, for this process's cores)")
        _need(c.data.prefetch >= 1, f"data.prefetch {c.data.prefetch} must be at least 1")
        _need(
            0 <= c.data.hw_decoder_load <= 1,
            f"data.hw_decoder_load {c.data.hw_decoder_load} is no share: it must be between 0 and 1",
        )
        _need(
            min(c.data.decoder_width_hint, c.data.decoder_height_hint) >= 0,
            "data.decoder_width_hint and data.decoder_height_hint are pixels: they must not be negative",
        )
        _need(
            c.schedule.steps is None or c.schedule.steps >= 1,
            f"schedule.steps {c.schedule.steps} must be positive (or None, to go by epochs)",
        )
        _need(c.schedule.epochs > 0, f"schedule.epochs {c.schedule.epochs} must be positive")
        _need(0 <= c.schedule.warmup_epochs < c.schedule.epochs, "schedule.warmup_epochs must be below schedule.epochs")
        _need(c.log.every >= 1 and c.log.checkpoint_every >= 1, "log.every and log.checkpoint_every must be positive")
        _need(c.log.keep >= 1, "log.keep must be at least 1: the newest checkpoint is what a cut run goes on from")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_converter = make_converter(forbid_extra_keys=True)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
_converter.register_unstructure_hook(Path, str)


def to_dict(config: Config) -> dict[str, Any]:
    """As nested plain types, for YAML and for checkpoints."""
    return _converter.unstructure(config)


def from_dict(raw: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; ConfigError names unknown keys and wrong types."""
    try:
        return _converter.structure(raw, Config)
    except ClassValidationError as error:
        raise ConfigError("; ".join(transform_error(error))) from error


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    return from_dict(yaml.safe_load(text))


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ, as {"section.field": (one, other)}."""
    flat_one, flat_other = _flatten(to_dict(one)), _flatten(to_dict(other))
    return {key: (flat_one[key], flat_other[key]) for key in flat_one if flat_one[key] != flat_other[key]}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
