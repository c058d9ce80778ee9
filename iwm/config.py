"""Typed configuration of a training run.

A recipe (iwm/recipes.py) is a function that returns a `Config`, and the command line overrides single fields. The
result is stored in the run's folder and in every checkpoint. Sections in brackets are those of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from dali_pipelines.augmentations import AugmentationError, ViewBackend, Views
from dali_pipelines.decoder import DECODER, Decoder, DecoderDevice
from iwm.block_sizes import check_sizes
from iwm.model_config import ActionConfig, EncoderConfig, LossConfig, MaskingConfig, PredictorConfig
from iwm.ranges import ConfigError as ConfigError
from iwm.ranges import Range, check_ranges

EncoderName = Literal["teacher", "student"]
"""EMA target encoder (teacher) or trained context encoder (student), as the paper's tables name them."""

ENCODERS: tuple[EncoderName, ...] = ("teacher", "student")

Pool = Literal["mean", "cls", "both"]
"""Input of a linear probe: the mean of the patches, the class token, or the one after the other."""

LayerNormKind = Literal["shared", "last", "own", "none"]
"""Norms of the intermediate layers that a segmentation head receives (iwm/models/heads.py, UPerNet)."""

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
class OptimConfig:
    """AdamW and its schedules (A.1). Values that the paper does not state are those of I-JEPA."""

    implementation: Literal["auto", "apex", "torch"] = "auto"
    """Kernels of AdamW. `apex`: FusedAdam, which needs apex built with its CUDA kernels.
    `torch`: torch's fused AdamW. `auto`: apex if available, else torch."""
    lr: float = 1e-3
    """Learning rate after the warm-up. A cosine then lowers it to final_lr."""
    start_lr: float = 2e-4
    """Learning rate at the start of the linear warm-up."""
    final_lr: float = 1e-6
    """Learning rate at the end of the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    weight_decay: float = 0.04
    """Weight decay at the start. A cosine changes it to final_weight_decay."""
    final_weight_decay: float = 0.4
    """Weight decay at the end of the schedule. Biases, norms and the mask token are never decayed."""
    grad_clip: float | None = None
    """Maximum global gradient norm. None: no clipping, as in the paper."""
    ema_momentum: float = 0.996
    """Momentum of the target encoder's EMA at the start. It changes linearly to final_ema_momentum."""
    final_ema_momentum: float = 1.0
    """Momentum of the target encoder's EMA at the end of the schedule."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and of its schedules (A.1)."""

    epochs: Annotated[float, Range(above=0)] = 300.0
    """Length of the run (epochs)."""
    warmup_epochs: Annotated[float, Range(min=0)] = 40.0
    """Length of the learning rate's linear warm-up (epochs), less than epochs."""
    scale: float = 1.25
    """Length of the schedules as a multiple of the run's length (I-JEPA's ipe_scale).
    Above 1, training ends before the schedules do."""
    steps: Annotated[int | None, Range(min=1)] = None
    """Length of the run in optimiser steps, in place of epochs. None: use epochs.
    The warm-up keeps its share of the run."""


AttentionImpl = Literal["auto", "triton", "sdpa", "eager"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs"]
ResidualDtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class TrainConfig:
    """Computation of the training step: device, precision, kernels and parallelism."""

    seed: int = 0
    """Seed of the model's initialisation, the sample order, the augmentations and the masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. `auto`: a GPU if there is one, else the CPU."""
    num_threads: Annotated[int, Range(min=0)] = 0
    """Threads of torch's CPU operators in each process.
    0: two threads where the model is on a GPU, else the process's share of the cores.
    On a CPU small models are faster with 1 thread: their operators are too short to parallelise.
    The pipeline then uses the other cores."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Precision of the computation. `fp32`: float32 throughout.
    `bf16`: bf16 autocast; parameters, optimiser state and EMA stay in float32.
    `fp8`: as `bf16`, with the linear layers of all blocks in float8; needs torchao (pip install 'iwm[fp8]').
    It needs a GPU of compute capability 8.9 (Ada, Hopper); a CPU emulates it. Not yet timed on a GPU."""
    compile: bool = True
    """Compile each block of the encoders and the predictor with torch.compile."""
    compile_mode: CompileMode = "default"
    """Mode of torch.compile. `default`: matrix products run in the vendor's library (cuBLAS on a GPU).
    `max-autotune-no-cudagraphs`: each product is timed there and as generated kernels, and the fastest is kept.
    Generated kernels can include what follows the product (bias, GELU, residual). Compilation takes longer.
    The choice may differ between two starts of a run, so a resumed run is not the same bit for bit."""
    attention_impl: AttentionImpl = "auto"
    """Attention kernels.
    `triton`: the project's kernels for bf16 sequences of at most 256 tokens on a GPU, otherwise as `sdpa`.
    Dense passes without gradients with heads wider than 32 also run as `sdpa`.
    `sdpa`: torch's scaled_dot_product_attention. `eager`: matmul, softmax, matmul; faster on a CPU.
    `auto`: `triton` on a Hopper GPU, where the kernels were measured, `sdpa` on other GPUs, `eager` on a CPU."""
    activation_checkpointing: bool = False
    """Store only the input of each block and recompute the other activations in the backward pass.
    This needs much less memory and a third more computation. Use it for ViT-L and large batches."""
    activation_memory_budget: Annotated[float, Range(min=0, max=1)] = 1.0
    """Share of the activations that a compiled block keeps for its backward pass (0 to 1).
    Below 1, torch recomputes the others, cheap kernels first: norms and GELU, then attention, then matrix products.
    0: only the block's input is kept."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism over processes. `ddp`: each process has the whole model.
    `fsdp`: parameters, gradients and moments are sharded (FSDP2), for encoders too large for one GPU's memory."""
    residual_dtype: ResidualDtype = "auto"
    """Precision of the residual stream under bf16 autocast. `auto`: bf16 on a GPU, fp32 on a CPU.
    `bf16`: less memory traffic and a faster step. `fp32`: as in I-JEPA's code."""
    cuda_graph: bool = True
    """On one GPU: capture the forward and backward passes of a compiled step as one CUDA graph and replay it.
    With several processes the step always runs kernel by kernel."""
    priority_stream: bool = True
    """On a GPU: run the step on a CUDA stream of higher priority than that of the pipeline."""
    collective_timeout: Annotated[float, Range(min=10)] = 600.0
    """With several processes: time (seconds) after which the run ends if one does not take part in a collective.
    Just before, the process that all others wait for is named. Validation and compilation must take less."""
    max_nonfinite_steps: int = 10
    """Number of consecutive steps with a non-finite gradient after which the run stops.
    Each such step is skipped and counted.
    They are found when metrics are read, so the run may stop log.interval steps later, on a GPU a few more."""
    deterministic: bool = False
    """Use deterministic, slower kernels on a GPU, for exact resume. Runs on a CPU are always deterministic."""

    @property
    def bf16_autocast(self) -> bool:
        """True where operators run in bf16 autocast."""
        return self.precision != "fp32"


@dataclass(frozen=True)
class LogConfig:
    """Metrics, checkpoints and validation during training."""

    interval: Annotated[int, Range(min=1)] = 50
    """Interval between two lines of metrics.jsonl (optimiser steps). On a GPU a line is written a few steps later.
    A line is also written before every validation and every checkpoint."""
    checkpoint_interval: Annotated[int, Range(min=1)] = 1000
    """Interval between two checkpoints (optimiser steps)."""
    keep_last_k: Annotated[int, Range(min=1)] = 2
    """Number of newest checkpoints to keep. Older ones are deleted, except those of keep_every."""
    keep_every: Annotated[int | None, Range(min=1)] = None
    """Interval between checkpoints that are never deleted (optimiser steps).
    None: only the newest keep_last_k are kept."""
    eval_interval: int = 1000
    """Interval between two measurements of MRR, feature_std and RankMe on held-out images (optimiser steps)."""
    eval_images: int = 16
    """Number of held-out images for MRR."""
    eval_bank_size: int = 64
    """Number of augmented views per image in the MRR bank. The reported MRR uses 256 (iwm evaluate mrr)."""
    tensorboard: bool = True
    """Write metrics also to TensorBoard files in the run's folder."""
    wandb_project: str | None = None
    """Project of Weights & Biases to send metrics and settings to; needs wandb (pip install 'iwm[wandb]').
    A resumed run continues its W&B run. WANDB_MODE=offline keeps the data in the run's folder, for `wandb sync`.
    None: nothing is sent."""
    wandb_entity: str | None = None
    """Entity (user or team) of the W&B project. None: WANDB_ENTITY, or the default of the W&B account."""


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
            _need(width % heads == 0, f"{name}.embed_dim {width} is not a multiple of {name}.num_heads {heads}")
            _need(width % 4 == 0, f"{name}.embed_dim {width} is not a multiple of 4, which 2-D sin-cos positions need")
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
