"""Typed configuration of a training run.

A recipe (iwm/recipes.py) is a function that returns a `Config`, and the command line overrides single fields. The
result is stored in the run's folder and in every checkpoint. Sections in brackets are those of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from dali_pipelines.augmentations import AugmentationError, ViewBackend
from dali_pipelines.decoder import DECODER, Decoder, DecoderDevice
from dali_pipelines.views import Views
from iwm.block_sizes import check_sizes
from iwm.model_config import ActionConfig, EncoderConfig, LossConfig, MaskingConfig, PredictorConfig, check_width
from iwm.ranges import ConfigError as ConfigError
from iwm.ranges import Range, check_ranges
from iwm.train_config import LogConfig, OptimConfig, ScheduleConfig, TrainConfig

PipelineBackend = Literal["auto", ViewBackend]


@dataclass(frozen=True)
class DataConfig:
    """Data, batch size and input pipeline."""

    shards: str = "data/imagenet"
    """Folder of shards, made by `iwm shards`, or its URL (s3://, gs://, hf://, https:// and others).
    Shards at a URL are copied to `cache` in the order in which they are needed."""
    cache: Path | None = None
    """Local folder for shards of URLs, which all processes of a machine and later runs share.
    None: iwm in $XDG_CACHE_HOME, else ~/.cache/iwm."""
    cache_gb: Annotated[float | None, Range(above=0)] = None
    """Size (GB) that the shards of one URL may take in `cache`: those not used for longest make room for others.
    Those that are needed at once are copied in any case: up to 84,000 images when a process resumes in mid-epoch.
    None: no limit."""
    train: str = "train"
    """Split used for training."""
    val: str | None = "val"
    """Split of held-out images. MRR, feature_std and RankMe are measured on them during training.
    None, or shards without the default split: these are not measured."""
    global_batch_size: Annotated[int, Range(min=1)] = 2048
    """Images per optimiser step, over all processes. The paper does not state it; 2,048 is that of I-JEPA."""
    micro_batch_size: Annotated[int | None, Range(min=1)] = None
    """Maximum number of images per process in one forward and backward pass. None: one pass per step.
    Gradients are accumulated over the passes of a step."""
    backend: PipelineBackend = "auto"
    """Implementation of the views. All sample the same parameters; pixels differ by rounding.
    `gpu`: DALI decodes and augments on the GPU.
    `cpu`: DALI decodes and augments on CPU cores; finished views are copied to the model's device.
    `triton`: DALI decodes, crops and resizes on the GPU; Triton kernels compute the colours on training's stream.
    `auto`: `gpu` where the model is on a GPU, else `cpu`."""
    num_threads: Annotated[int, Range(min=0)] = 0
    """CPU threads of each process's input pipeline.
    0: the process's share of the available cores, less two for torch's operators where the model is on a GPU."""
    prefetch_queue_depth: Annotated[int, Range(min=1)] = 2
    """Number of batches prepared in advance."""
    decoder_device: DecoderDevice = DECODER.device
    """With backends `gpu` and `triton`: device that decodes JPEGs. `gpu`: nvJPEG decodes.
    `cpu`: CPU cores decode and crop; the crops are copied to the GPU."""
    hw_decoder_load: Annotated[float, Range(min=0, max=1)] = DECODER.hw_decoder_load
    """On a GPU: share of the images (0 to 1) decoded by the hardware JPEG engine.
    The kernels of nvJPEG decode the others."""
    decoder_width_hint: Annotated[int, Range(min=0)] = DECODER.width_hint
    """On a GPU: image width (pixels) for which decoder memory is allocated in advance.
    Wider images cost a reallocation."""
    decoder_height_hint: Annotated[int, Range(min=0)] = DECODER.height_hint
    """On a GPU: image height (pixels) for which decoder memory is allocated in advance.
    `iwm bench tune` prints the fastest backend, decoder, threads and queue depth."""

    @property
    def folder(self) -> Path:
        """Local folder of the shards; of a URL, that of its cache, to which shards are copied as they are needed.

        Raises ShardError where the manifest of a URL cannot be fetched.
        """
        # Imported late: it needs locks that not every system has on which a trained model is loaded.
        from shards.cache import local_folder

        return local_folder(self.shards, self.cache, self.cache_gb)

    @property
    def decoder(self) -> Decoder:
        """Settings of the JPEG decoder."""
        return Decoder(self.decoder_device, self.hw_decoder_load, self.decoder_width_hint, self.decoder_height_hint)


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    views: Views = field(default_factory=Views)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init_from: Path | None = None
    """Known weights to start from: a run, a checkpoint, an exported folder, or the file of a published encoder.
    docs/pretrained-weights.md lists what is loaded from each. It is read before the first step only.
    None: a random initialisation."""

    @property
    def grid_size(self) -> int:
        """Number of patches along one side of a view."""
        return self.views.size // self.encoder.patch_size

    def check(self) -> None:
        """Raise ConfigError where a field is out of its range or fields contradict each other."""
        check_ranges(self, "")
        c = self
        _need(
            c.train.compile or c.train.activation_memory_budget == 1,
            f"train.activation_memory_budget {c.train.activation_memory_budget}: only a compiled step recomputes "
            "single kernels; use --train.compile or --train.activation-checkpointing",
        )
        try:
            c.views.check()
        except AugmentationError as error:
            raise ConfigError(f"views.{error}") from error
        _need(
            c.views.size % c.encoder.patch_size == 0,
            f"views.size {c.views.size} is not a multiple of encoder.patch_size {c.encoder.patch_size}",
        )
        for name, width, heads, ratio in (
            ("encoder", c.encoder.embed_dim, c.encoder.num_heads, c.encoder.mlp_ratio),
            ("predictor", c.predictor.embed_dim, c.predictor.num_heads, c.predictor.mlp_ratio),
        ):
            check_width(width, heads, f"{name}.embed_dim", f"{name}.num_heads")
            hidden = int(width * ratio)
            _need(
                c.train.precision != "fp8" or (width % 16 == 0 and hidden % 16 == 0),
                f"train.precision fp8: {name}.embed_dim {width} and {name}.mlp_ratio {ratio} make layers of {width} "
                f"and {hidden} features, which must be multiples of 16; change them, or use --train.precision bf16",
            )
        _need(
            c.grid_size >= 3,
            f"views.size {c.views.size}: a grid of {c.grid_size}×{c.grid_size} patches is too small to mask; increase "
            "views.size or decrease encoder.patch_size",
        )
        _need(
            c.masking.type == "iwm" or c.loss.predict == "masked",
            "loss.predict all: masking.type ijepa predicts only its blocks; use --masking.type iwm or "
            "--loss.predict masked",
        )
        _need(
            c.masking.type == "iwm" or c.masking.num_blocks * c.masking.block_scale[1] < c.masking.context_scale[0],
            "masking: the target blocks of type ijepa can cover the whole context block; decrease "
            "masking.num_blocks or masking.block_scale",
        )
        _need(
            c.masking.block_scale[0] <= c.masking.block_scale[1],
            f"masking.block_scale {c.masking.block_scale[0]} {c.masking.block_scale[1]} must be MIN MAX, MIN <= MAX",
        )
        _need(
            c.masking.type == "ijepa" or not c.masking.cut,
            "masking.cut: masking.type iwm predicts all that is hidden, so nothing can be cut; use --masking.no-cut "
            "or --masking.type ijepa",
        )
        if c.masking.sampler == "official":
            check_sizes(c.masking, c.grid_size)
        _need(
            c.train.parallel == "ddp" or c.optim.implementation != "apex",
            "optim.implementation apex: apex does not support sharded parameters; use --optim.implementation auto with "
            "--train.parallel fsdp",
        )
        _need(
            c.train.parallel == "ddp" or c.train.precision != "fp8",
            "train.precision fp8: float8 layers of sharded parameters were never tested; use --train.parallel ddp or "
            "--train.precision bf16",
        )
        tuned = c.train.compile_mode != "default"
        _need(
            c.train.compile or not tuned,
            f"train.compile_mode {c.train.compile_mode}: nothing is compiled; use --train.compile or "
            "--train.compile-mode default",
        )
        _need(
            not (c.train.deterministic and tuned),
            f"train.compile_mode {c.train.compile_mode}: kernels are chosen by their times, which train.deterministic "
            "forbids; use --train.compile-mode default or --train.no-deterministic",
        )
        _need(
            c.schedule.warmup_epochs < c.schedule.epochs,
            f"schedule.warmup_epochs {c.schedule.warmup_epochs} must be less than schedule.epochs {c.schedule.epochs}",
        )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
