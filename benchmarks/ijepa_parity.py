"""Parity of the I-JEPA recipes with I-JEPA's own code: initial weights, masks and schedules, beside its figures.

python benchmarks/ijepa_parity.py [--recipes ijepa_official_b16 ijepa_b16_12x384] [--steps 400] [--json FILE]

This project's figures are computed when it runs, from the model, the masks and the schedules that training uses. Those
of I-JEPA come from runs of its code on a CPU (OFFICIAL). Nothing is trained, and no data are needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import tyro
from environment import check_writable, environment_info, lookup
from options import IjepaParityOptions
from rich.console import Console

from iwm.config import Config
from iwm.evaluation.result_table import ResultTable
from iwm.masking import sample_masks
from iwm.models.world_model import WorldModel
from iwm.ranges import check_ranges
from iwm.recipes import RECIPES
from iwm.training.optim import build_schedules
from shards.command_line import run_command

COMMIT = "52c1ae95d05f743e000e8f10a1f3a79b10cff048"
"""Commit of facebookresearch/ijepa whose code gave the figures below, on a CPU with torch's seed 0."""

OFFICIAL: dict[str, float] = {
    # init_model of src/helper.py, vit_base with a predictor of 12 blocks: standard deviations.
    **{
        f"{network} block {block} {layer}": 0.02
        for network in ("encoder", "predictor")
        for block in (1, 6, 12)
        for layer in ("qkv", "proj", "fc1", "fc2")
    },
    "patch embedding": 0.02,
    "mask token": 0.02,
    "predictor input": 0.02,
    "predictor output": 0.02,
    # MaskCollator of src/masks/multiblock.py with the masks of configs/in1k_vith14_ep300.yaml and patches of 16 px
    # (grid of 14×14), 1,000 batches of 128 images: patches.
    "context": 81.86,
    "context, deviation in a batch": 12.97,
    "context, deviation of a batch's mean": 4.51,
    "context, cut": 50.54,
    "context, deviation of the cut": 7.26,
    "target block": 33.34,
    "target block, deviation": 2.89,
    "target block, cut": 33.34,
    # The schedules of src/utils/schedulers.py and src/train.py with that file's settings and 625 steps per epoch.
    "batch": 2048,
    "epochs": 300,
    "warm-up, epochs": 40,
    "learning rate, step 1": 0.000200032,
    "learning rate, step 10,000": 0.00052,
    "learning rate, step 25,000": 0.001,
    "learning rate, step 93,751": 0.0006200287981250594,
    "learning rate, step 150,001": 0.00012661247773375939,
    "learning rate, step 187,500": 1e-06,
    "weight decay, step 1": 0.04000000002526616,
    "weight decay, step 10,000": 0.042520713327309057,
    "weight decay, step 25,000": 0.05556181762433182,
    "weight decay, step 93,751": 0.22000301592894725,
    "weight decay, step 150,001": 0.36562483168560694,
    "weight decay, step 187,500": 0.4,
    "EMA, step 1": 0.996,
    "EMA, step 10,000": 0.996213312,
    "EMA, step 25,000": 0.996533312,
    "EMA, step 93,751": 0.998,
    "EMA, step 150,001": 0.9992,
    "EMA, step 187,500": 0.9999999786666667,
}
"""Figures of I-JEPA's code; batch, epochs and warm-up are those of its configuration, the ViT-H/14's."""

STEPS_PER_EPOCH = 625
"""Steps per epoch of ImageNet's 1,281,167 images with a batch of 2,048, without the last, smaller one."""
BATCH = 128
"""Images of a batch on one GPU of I-JEPA, over which its masks are cut."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures. arguments: None for those of the program. Raises UserError for what the user can fix."""
    options = tyro.cli(IjepaParityOptions, args=arguments, description=__doc__, prog="benchmarks/ijepa_parity.py")
    if options.json is not None:
        check_writable("--json", options.json)
    result = run(options, Console())
    if options.json is not None:
        options.json.write_text(json.dumps({**result, "machine": environment_info()}, indent=1) + "\n")


def run(options: IjepaParityOptions, console: Console) -> dict[str, Any]:
    """Print the table and return all figures. Raises UserError for what the user can fix."""
    check_ranges(options)
    figures = {name: figures_of(lookup("--recipes", name, RECIPES)(), options.steps) for name in options.recipes}
    show(figures, console)
    return {"commit": COMMIT, "official": OFFICIAL, "recipes": figures}


def figures_of(config: Config, steps: int) -> dict[str, float]:
    """Compute all figures of a recipe."""
    return {**initial_deviations(config), **mask_statistics(config, steps), **schedule_values(config)}


def initial_deviations(config: Config) -> dict[str, float]:
    """Return standard deviations of initial weights, by layer, from a model as training builds it, with seed 0."""
    torch.manual_seed(0)
    model = WorldModel(config)
    found: dict[str, Any] = {}
    for name, blocks in (("encoder", model.encoder.blocks), ("predictor", model.predictor.blocks)):
        for number in (number for number in (1, 6, 12) if number <= len(blocks)):
            block: Any = blocks[number - 1]
            layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
            found |= {f"{name} block {number} {layer}": module.weight for layer, module in layers.items()}
    found["patch embedding"] = model.encoder.patch_embed.proj.weight
    found["mask token"] = model.predictor.mask_token
    found["predictor input"] = model.predictor.predictor_embed.weight
    found["predictor output"] = model.predictor.predictor_proj.weight
    return {name: weight.std().item() for name, weight in found.items()}


def mask_statistics(config: Config, steps: int) -> dict[str, float]:
    """Return statistics of the patches of contexts and target blocks, before and after the cut of this recipe."""
    found: dict[str, float] = {}
    for suffix, masking in (("", replace(config.masking, cut=False)), (", cut", config.masking)):
        masks = [sample_masks(masking, config.grid_size, 0, step, torch.arange(BATCH)) for step in range(steps)]
        context = torch.stack([each.visible.sum(1) for each in masks]).double()
        blocks = torch.stack([each.predicted.sum(-1) for each in masks]).double()
        found[f"context{suffix}"], found[f"target block{suffix}"] = context.mean().item(), blocks.mean().item()
        if not suffix:
            found["context, deviation in a batch"] = context.var(1).mean().sqrt().item()
            found["context, deviation of a batch's mean"] = context.mean(1).std().item()
            found["target block, deviation"] = blocks.std().item()
        elif masking.cut:
            found["context, deviation of the cut"] = context[:, 0].std().item()
    return found


def schedule_values(config: Config) -> dict[str, float]:
    """Return batch, lengths and the schedules' values at the steps of OFFICIAL, counted from 1."""
    schedules = build_schedules(config, STEPS_PER_EPOCH)
    found: dict[str, float] = {
        "batch": config.data.global_batch_size,
        "epochs": config.schedule.epochs,
        "warm-up, epochs": config.schedule.warmup_epochs,
    }
    for step in (1, 10_000, 25_000, 93_751, 150_001, 187_500):
        values = schedules.values_at(step - 1)
        found |= {
            f"learning rate, step {step:,}": values.lr,
            f"weight decay, step {step:,}": values.weight_decay,
            f"EMA, step {step:,}": values.ema,
        }
    return found


def show(figures: dict[str, dict[str, float]], console: Console) -> None:
    """Print a table: a figure in each row, I-JEPA's code and the recipes in columns."""
    rows = []
    for name, official in OFFICIAL.items():
        own = [each.get(name) for each in figures.values()]
        rows.append([name, written(official), *("–" if value is None else written(value) for value in own)])
    columns = ["figure", "I-JEPA's code", *figures]
    console.print(ResultTable(f"facebookresearch/ijepa at {COMMIT[:8]}", columns, rows))


def written(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and value >= 1 else f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/ijepa_parity.py"))
