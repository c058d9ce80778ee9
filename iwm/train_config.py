"""Sections of a run's configuration on its training: optimiser, schedules, computation of the step, logging.

Sections in brackets are those of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from iwm.ranges import Range


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
