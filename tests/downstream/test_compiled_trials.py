"""Compiled protocols have the losses of uncompiled ones, one graph per kind of module, and no late compilation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import finish, metrics

STEPS, SEEN = 9, 7
"""Number of steps, and the step after the first evaluation, whose last batch (8 images) is smaller."""
CASES: list[tuple[str, dict[str, Any], int]] = [
    # In training and in evaluation: embedding, a block without and one with drop path (whatever its rate).
    ("finetune-encoder", {}, 2 * 3),
    ("finetune-encoder", {"activation_checkpointing": True}, 2 * 3),
    # Embedding of mixed and of decoded pixels, the frozen block; in training and in evaluation, for either output:
    # building the sequence, a block without and one with drop path.
    ("finetune-predictor", {"actions": ["null", "random"], "outputs": ["image", "token"]}, 3 + 2 * 2 * 3),
    # Frozen embedding and block; trained embedding and block; sequence and block of the predictor. Whole images have
    # other sizes than crops and are evaluated uncompiled.
    (
        "segmentation",
        {"classes": 4, "reduce_zero_label": False, "channels": 8, "lr": [1e-3], "parts": ["encoder", "predictor"]},
        2 + 2 + 2,
    ),
]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options", "graphs"), CASES, ids=[name for name, _, _ in CASES])
def test_each_kind_of_part_is_compiled_once_and_losses_are_the_uncompiled_ones(
    leverage: Callable[..., Any], run: Path, name: str, options: dict[str, Any], graphs: int, backend: str
) -> None:
    options |= {"steps": STEPS, "log_every": 1}
    if backend == "inductor" and name != "segmentation":
        options |= {"drop_path": 0.0}  # inductor samples other values
        graphs = {"finetune-encoder": 4, "finetune-predictor": 11}[name]
    words = [str(run), str(run / "eval/compiled.json"), name, backend, json.dumps(options)]
    counted = json.loads(finish([sys.executable, "tests/downstream/counted.py", *words]).splitlines()[-1])
    assert counted["graphs"][SEEN:] == [counted["graphs"][SEEN]] * (STEPS - SEEN), counted["graphs"]
    assert (counted["total"], counted["breaks"]) == (graphs, 0)
    leverage(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    losses = [
        [line["loss"] for line in metrics(run / f"eval/{folder}") if "loss" in line] for folder in ("compiled", name)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == STEPS
