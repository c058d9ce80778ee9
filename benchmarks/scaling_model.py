"""Print the tables of docs/scaling.md: python benchmarks/scaling_model.py

Parameters are counted on the recipes' own models, FLOPs come from iwm/flops.py; all times are predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from scaling_formulas import (
    GPUS_PER_NODE,
    REFERENCE_BATCH,
    Work,
    checkpoint_bytes,
    gradient_bytes,
    parameters,
    predict,
    state_bytes,
)

from iwm.config import Config
from iwm.flops import training_flops
from iwm.models.world_model import WorldModel
from iwm.recipes import RECIPES

GPUS = (8, 16, 64, 128, 512)
Aim = Literal["must", "lead"]
AIMS: dict[str, dict[Aim, float]] = {
    "iwm_b16_equi_18x384": {"must": 2400.0, "lead": 3000.0},
    "iwm_l16_equi_36x512": {"must": 770.0, "lead": 900.0},
}
"""Images per second that one H100 is to reach on resident batches. Aims, not measurements."""
PAPER_BATCH = Config().data.batch
IMAGENET_BYTES = 147_897_477_120 / 1_281_167
"""Of an image: ILSVRC2012_img_train.tar over its number of images."""
RESIZED_BYTES = 31_075
"""Of an image made with --resize 320: measured on the benchmarks' 1,200 tiles."""
IMAGES_PER_CORE = 500
"""Images of two views of 224 px that a core makes in a second, rounded from benchmarks/results/data-cpu.json."""


def model(recipe: str) -> WorldModel:
    """A recipe's model, without memory for its parameters."""
    with torch.device("meta"):
        return WorldModel(RECIPES[recipe]())


def work(recipe: str, aim: Aim) -> Work:
    """The recipe on a GPU that reaches its aim."""
    built, flops = model(recipe), training_flops(RECIPES[recipe]())
    # Two thirds of what is trained is backward; the target encoder has none.
    backward = 2 / 3 * (flops.context_encoder + flops.predictor) / flops.total
    return Work(parameters(built, True), parameters(built, False), AIMS[recipe][aim], backward)


def sizes() -> str:
    """Parameters and bytes of every paper recipe."""
    rows = []
    for recipe in (name for name in RECIPES if name not in ("demo", "cpu_small")):
        built = model(recipe)
        trained, target = parameters(built, True), parameters(built, False)
        encoder = parameters(built.encoder, True)
        rows.append(
            [
                f"`{recipe}`",
                f"{encoder / 1e6:.1f} + {(trained - encoder) / 1e6:.1f}",
                f"{gradient_bytes(trained) / 2**20:,.0f}",
                f"{checkpoint_bytes(trained, target) / 1e9:.2f}",
                f"{state_bytes(trained, target) / 1e9:.1f}",
                f"{state_bytes(trained, target, GPUS_PER_NODE) / 1e9:.1f}",
            ]
        )
    heads = ["recipe", "encoder + predictor, M", "gradients, MiB", "checkpoint, GB"]
    return table([*heads, "state per GPU, DDP, GB", f"FSDP2 over {GPUS_PER_NODE}, GB"], rows)


def efficiency(each: int | None) -> str:
    """Predicted efficiency by number of GPUs. each: images on each GPU; None: the paper's batch, shared."""
    rows = []
    for recipe, aims in AIMS.items():
        works = [work(recipe, aim) for aim in aims]
        for gpus in GPUS:
            images = each or PAPER_BATCH // gpus
            predicted = [predict(one, gpus, images) for one in works]
            row = [f"`{recipe}`", f"{gpus}", f"{images}", f"{1e3 * predicted[0].exchange:.1f}"]
            for p in predicted:
                row += [f"{1e3 * p.alone:.1f}", f"{1e3 * p.shown:.1f}", f"{p.efficiency:.2f}"]
            rows.append(row)
    heads = [f"{aim}: {what}" for aim in ("must", "lead") for what in ("step, ms", "shown, ms", "efficiency")]
    return table(["recipe", "GPUs", "images each", "all-reduce, ms", *heads], rows)


def inputs() -> str:
    """What a node of GPUs must be fed with where each reaches its aim."""
    rows = []
    for recipe, aims in AIMS.items():
        for aim, rate in aims.items():
            images = GPUS_PER_NODE * rate
            rows.append(
                [
                    f"`{recipe}`, {aim}",
                    f"{images:,.0f}",
                    f"{images * IMAGENET_BYTES / 1e9:.2f}",
                    f"{images * RESIZED_BYTES / 1e9:.2f}",
                    f"{rate / IMAGES_PER_CORE:.1f}",
                ]
            )
    heads = ["aim", f"images/s, {GPUS_PER_NODE} GPUs", "ImageNet as it is, GB/s", "--resize 320, GB/s"]
    return table([*heads, "cores per GPU, if a CPU made the views"], rows)


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


TABLES = {
    "Sizes": sizes,
    f"Predicted, {REFERENCE_BATCH} images on each GPU": lambda: efficiency(REFERENCE_BATCH),
    f"Predicted, {PAPER_BATCH} images in all": lambda: efficiency(None),
    "Input": inputs,
}


if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")
