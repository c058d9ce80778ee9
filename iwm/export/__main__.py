"""Export a trained model: iwm export RUN_OR_CHECKPOINT OUT [--head RUN/eval/linear] [--formats onnx torch-export]

The folder contains the weights as safetensors, the configuration as JSON, and a model card. `iwm.load(OUT)` loads it,
and `timm.create_model("local-dir:OUT", pretrained=True)` loads its encoder. With --head, the export also contains the
head that a protocol of `iwm evaluate` trained, for classification or segmentation. With --formats it contains encoder
and predictor as graphs for deployment, and --push-to-hub NAMESPACE/NAME makes it a repository of the Hugging Face Hub.
See docs/using-a-model.md.
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
    formats: tuple[Literal["onnx", "torch-export"], ...] = ()
    """Further formats of encoder and predictor, beside safetensors. `onnx`: encoder.onnx, predictor.onnx.
    `torch-export`: encoder.pt2, predictor.pt2, for torch.export.load."""
    license: str | None = None
    """License of the weights for the model card, an identifier of the Hugging Face Hub such as apache-2.0."""
    push_to_hub: Annotated[str | None, arg(metavar="NAMESPACE/NAME")] = None
    """Repository of the Hugging Face Hub to which the folder is uploaded, with the token of `hf auth login`."""
    private: bool = False
    """With --push-to-hub: a new repository is private."""


def export(options: ExportOptions) -> list[str]:
    """Write the folder and upload it where asked for; return what the user should know.

    Raise UserError or OSError; none of them leaves a partial folder.
    """
    if not options.source.exists():
        raise UserError(f"{options.source} does not exist; correct the path")
    if options.private and options.push_to_hub is None:
        raise UserError("--private is about a new repository; give --push-to-hub NAMESPACE/NAME too, or omit it")
    # Imported here: torch takes seconds, which a mistyped option must not cost.
    hub = None
    if options.push_to_hub is not None:
        from iwm.export.hub import full_name, push

        hub = full_name(options.push_to_hub)  # before the export, which takes longer

    from iwm.export.from_run import ExportExtras, export_run

    extras = ExportExtras(options.license, options.formats, hub)
    notes = export_run(options.source, options.out, options.encoder, options.head, extras)
    return notes + ([f"uploaded: {push(options.out, hub, options.private)}"] if hub else [])


def main(arguments: Sequence[str] | None = None, prog: str = "tools/export.py") -> None:
    """Export. arguments: None for those of the program. Raises UserError for what the user can fix."""
    options = tyro.cli(ExportOptions, args=arguments, description=__doc__, prog=prog)
    notes = export(options)
    print("\n".join([f"written: {options.out}", *notes]))


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm.export"))
