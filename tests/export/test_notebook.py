"""docs/iwm-in-python.ipynb: what it prints about a run is right, and its committed outputs are of one clean pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import iwm
from dali_pipelines.augmentations import IDENTITY
from dali_pipelines.replay import apply_photometric
from dali_pipelines.validation_loader import ValidationLoader
from iwm.actions import action_between
from iwm.training.checkpoint import load_world_model
from tools.demo import EXPECTED

NOTEBOOK = Path(__file__).parents[2] / "docs" / "iwm-in-python.ipynb"


def texts(notebook: nbformat.NotebookNode) -> str:
    """Return what all cells printed."""
    return "\n".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


def number(pattern: str, printed: str) -> float:
    (found,) = re.findall(pattern, printed)
    return float(found)


def execute(folder: Path, names: list[str]) -> tuple[str, dict[str, Any]]:
    """Execute the notebook; return what it printed, and some of its variables, which a last cell saves in `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = f"torch.save({{name: globals()[name] for name in {names}}}, {str(folder / 'values.pt')!r})"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    return texts(notebook), torch.load(folder / "values.pt", weights_only=False)


def test_what_it_prints_about_a_run_is_right(
    leverage: Callable[..., dict[str, Any]], run: Path, boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = leverage("linear", lr=(10.0,), validate_every=100.0)
    monkeypatch.setenv("IWM_RUN", str(run))
    monkeypatch.setenv("IWM_LABEL", "label")
    printed, values = execute(tmp_path, ["images", "labels", "nearest", "params", "scores", "exchanged"])
    (batch,) = ValidationLoader(boxes, "val", size=32, batch_size=48, num_threads=1, label="label")
    assert batch.labels is not None
    assert "48 images of 48 × 48 px; label: blue, green, red" in printed
    assert torch.equal(values["labels"], batch.labels)
    assert printed.count("the same pixels: True") == 5
    assert "the same pixels: False" not in printed

    world, config = load_world_model(run)
    pixels = iwm.load(run).pixels(values["images"])
    vectors = world.encode(pixels, "teacher").mean(1)
    vectors = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    nearest = [max((float(a @ b), j) for j, b in enumerate(vectors) if j != i)[1] for i, a in enumerate(vectors)]
    assert values["nearest"][:, 0].tolist() == nearest
    same = np.mean([batch.labels[i] == batch.labels[j] for i, j in enumerate(nearest)])
    assert number(r"has the same label: ([\d.]+)%", printed) == pytest.approx(100 * same, abs=0.06)

    # Of the last of the 16 images, by loops: the rank of each true view among all.
    params = values["params"]
    action = action_between(torch.tensor([IDENTITY]).expand_as(params), params, world.action_spec)
    source = pixels[15:16].expand(len(params), -1, -1, -1)
    targets = world.target_features(apply_photometric(source, params, config.views.jitter_impl)).mean(1).double()
    predicted = world.predict(world.encode(source, "teacher"), action).mean(1).double()
    ranks, control = [], []
    for i, prediction in enumerate(predicted):
        away = (targets - prediction).norm(dim=1)
        ranks.append(1 + int((away < away[i]).sum()))
        control.append(1 + int((away < away[(i + 1) % len(away)]).sum()))
    assert values["scores"][15].item() == pytest.approx(np.mean(1 / np.array(ranks)), rel=1e-3)
    assert values["exchanged"][15].item() == pytest.approx(np.mean(1 / np.array(control)), rel=1e-3)
    assert number(r"MRR ([\d.]+),", printed) == pytest.approx(torch.stack(values["scores"]).mean().item(), abs=6e-4)
    assert number(r"chance ([\d.]+)", printed) == pytest.approx(sum(1 / i for i in range(1, 257)) / 256, abs=6e-4)

    best = result["trials"][result["chosen"]]["best"]["score"]
    assert number(r"(\d+) of 48 are classified correctly", printed) == pytest.approx(48 * best, abs=1.01)
    assert number(r"predictions of the export and of the run: (\S+)", printed) == 0
    assert number(r"features of timm's encoder and of the model: (\S+)", printed) < 1e-4


def test_committed_outputs_are_of_one_clean_pass_on_the_demos_model() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 400_000
    printed = texts(notebook)
    assert re.findall(r"(?:^|[\s'\"(])(?:/|[A-Z]:\\)[\w.]+[/\\]", printed) == []
    assert number(r"MRR ([\d.]+),", printed) >= EXPECTED["at least"]
    assert number(r"with other actions ([\d.]+)", printed) <= EXPECTED["at most"]
    assert number(r"has the same colour: ([\d.]+)%", printed) > 2 * number(r"of random pairs ([\d.]+)%", printed)
    assert number(r"(\d+) of 384 are classified correctly", printed) > 384 * 0.45
