"""Export a trained model: iwm export RUN_OR_CHECKPOINT OUT [--head RUN/eval/linear] [--encoder student]

The folder contains the weights as safetensors (the encoder with the parameter names of timm's VisionTransformer), the
configuration as JSON, and a model card. `iwm.load(OUT)` loads it. With --head, the export also contains the head that a
protocol of `iwm evaluate` trained, for classification or segmentation. See docs/using-a-model.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from shards.command_line import run_command
from shards.errors import UserError


@dataclass(frozen=True)
class ExportOptions:
    """Export a trained model as safetensors with a model card."""

    source: Positional[Annotated[Path, arg(metavar="RUN_OR_CHECKPOINT")]]
    """Folder of a run (its newest checkpoint is used), or one checkpoint file."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Output folder. A folder that contains another model is refused."""
    encoder: Literal["teacher", "student"] | None = None
    """`teacher`: the EMA target encoder. `student`: the context encoder, which is trained by gradients.
    Default: the encoder that the head was trained on; without a head `teacher`."""
    head: Path | None = None
    """Folder of a protocol's training, for example RUN/eval/linear.
    The head of the best trial at its best epoch is exported too, with the checkpoint that it was trained on."""


def export(options: ExportOptions) -> None:
    """Write the folder. Raise CheckpointError, ConfigError or OSError; none of them leaves a partial folder."""
    if not options.source.exists():
        raise UserError(f"{options.source} does not exist; correct the path")
    # Imported here: torch takes seconds, which a mistyped option must not cost.
    from iwm.export.from_run import export_run

    export_run(options.source, options.out, options.encoder, options.head)


def main(arguments: Sequence[str] | None = None, prog: str = "tools/export.py") -> None:
    """Export. arguments: None for those of the program. Raises UserError for what the user can fix."""
    options = tyro.cli(ExportOptions, args=arguments, description=__doc__, prog=prog)
    export(options)
    print(f"written: {options.out}")


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm.export"))
