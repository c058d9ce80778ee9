"""A result with all kinds of figures, as an evaluator writes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iwm.evaluation.colour_scale import ColourScale
from iwm.evaluation.figures import FigureTile, Matrix, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
from iwm.evaluation.similarity import FIGURES, tables


def _view(level: int, side: int = 16) -> Tensor:
    return torch.full((side, side, 3), level, dtype=torch.uint8)


def _figures(key: str) -> list[TileFigure]:
    columns = [
        TileColumn(
            f"×{i}", (FigureTile(_view(20 * i), f"{key}, {i}: true"), FigureTile(_view(100), f"{key}, {i}", i % 2 == 0))
        )
        for i in range(11)
    ]
    block = TileBlock(key, columns, rows=("true", "nearest"), notes=(key,))
    scale = ColourScale(-0.5, 1.0)
    tile = FigureTile(scale.colours(torch.eye(6)), "the matrix", exact=True)
    matrix = Matrix(tile, [(key, FigureTile(_view(60 * i), f"{key}, {i}")) for i in range(3)])
    return [
        TileFigure(key, f"{key} are shown", [TileGroup(key, [block])], mark="the nearest view is the true view"),
        TileFigure("Matrix", key, matrix=matrix, scale=scale.bar(f"similarity of {key}")),
        TileFigure(key, "folded", [TileGroup("", [block])], folded=True),
    ]


def write_similarity(folder: Path, key: str) -> Path:
    """Add a result with all kinds of figures, of a photograph `key`, to a run folder; return the folder."""
    output = folder / "eval" / "similarity.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    score = {"mean": 0.5, "standard_error": 0.1}
    result: dict[str, Any] = {"protocol": "similarity", "encoder": key, "images": 3, "augmentations": 2, "shown": [key]}
    result |= dict.fromkeys(FIGURES, score) | write_figures(_figures(key), output)
    output.write_text(json.dumps(result | {"tables": [asdict(table) for table in tables(result)]}))
    return folder


def inferred_actions_result() -> dict[str, Any]:
    """Return a result of infer-action with a parameter, a flag and a control, without figures."""
    score = {"mean": 0.4, "standard_error": 0.02}
    scores = {
        "parameters": {"hue": {"error": score, "correlation": {**score, "mean": 0.87}, "within_tenth": score}},
        "flags": {"source_blur": {"balanced_accuracy": score}},
    }
    search = {"found": score, "true": score, "nearer": score}
    methods = ("guess", "gradient", "control")
    values = {name: [-20.0 + i + j for i in range(20)] for j, name in enumerate(("true", *methods))}
    kind = {
        "pairs": 20,
        "methods": dict.fromkeys(methods, scores),
        "searches": {"lattice": search, "gradient": {**search, "predictions": 98.0, "milliseconds": 12.0}},
        "values": {"image": ["a"] * 20, "entries": {"hue": values}},
    }
    how = {"images": 5, "distance": "per_token", "search": ["gradient"], "control": "runs/control"}
    return {"protocol": "infer-action", **how, "kinds": {"destructive": kind}, "left_out": {}, "figures": []}
