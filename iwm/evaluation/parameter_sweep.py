"""Parameter sweeps (paper, appendix I, figures S9 to S11): one augmentation parameter along a grid.

A series is a set of views of one image that differ in a single parameter. There are two kinds:

- Applied: jitter, and grayscale, blur and solarize if the action includes the target's flags. The source is the clean
  image; the prediction with the action to a view should be nearest to that view. Control: the actions of the series,
  shuffled, whose rank correlation is 0 on average.
- Undone: grayscale, blur and solarize of the source. The source is a view and the action leads to the clean image,
  which should be nearest. Control: the action does not describe the augmentation of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor

from dali_pipelines.augmentations import COLUMNS, IDENTITY, JITTER_OPS, OP_BY_NAME, Op
from dali_pipelines.views import Views
from iwm.actions import action_between
from iwm.evaluation.bank import (
    MIN_FACTOR,
    TIE_TOLERANCE,
    UNCONDITIONED_NOTE,
    Bank,
    actions_from,
    embed_bank,
    predicted_distances,
)
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import (
    DISTANCES,
    SweepSettings,
    bank_augmentation,
)


@dataclass(frozen=True)
class Sweep:
    """Series of views of an image that differ in one parameter, and direction of the action."""

    op: str
    """Name of one of OPS."""
    undo: bool
    """True where the action undoes the views' augmentation; False where it leads from the clean image to the views."""
    values: list[float]
    """Factors, turns of hue, pixels, or 0 and 1. The first value of an undo sweep is the identity."""
    views: Float[Tensor, "n p"]
    trained: bool
    """True where the run's views varied this parameter in training."""

    @property
    def name(self) -> str:
        return f"undo {self.op}" if self.undo else self.op

    @property
    def targets(self) -> list[int]:
        """Index of the target view of each prediction."""
        return [0] * len(self.values) if self.undo else list(range(len(self.values)))


def make_sweeps(views: Views, target_flags: bool, settings: SweepSettings) -> list[Sweep]:
    """Return all series for a run with these views. Raises the ConfigError of `bank_augmentation`."""
    jitter = bank_augmentation(views, settings.scenario, "--scenario")
    seen = max(views.source.jitter_probability, views.target.jitter_probability) > 0
    sweeps = []
    for op in JITTER_OPS:
        low, high = jitter.value_range(op)
        if low < high:
            low = max(low, MIN_FACTOR) if op.is_factor else low
            own = any(view.value_range(op) != (op.identity, op.identity) for view in (views.source, views.target))
            sweeps.append(_series(op, torch.linspace(low, high, settings.num_values), undo=False, trained=seen and own))
    for op in views.destructive_ops:
        most = max(views.source.value_range(op)[1], views.target.value_range(op)[1])
        grid = torch.linspace(0, most, 2 if op.is_switch else settings.num_sigmas)
        applied, undone = (view.probability(op) > 0 for view in (views.target, views.source))
        if target_flags:
            sweeps.append(_series(op, grid, undo=False, trained=applied))
        sweeps.append(_series(op, grid, undo=True, trained=undone))
    return sorted(sweeps, key=lambda series: series.undo)


def _series(op: Op, values: Float[Tensor, " n"], *, undo: bool, trained: bool) -> Sweep:
    views = torch.tensor(IDENTITY).repeat(len(values), 1)
    views[:, COLUMNS[op.name]] = values
    return Sweep(op.name, undo, values.tolist(), views, trained)


@dataclass(frozen=True)
class SweepResult:
    """Retrieval along one series of one image."""

    nearest: Int[Tensor, " n"]
    """Index of the nearest view."""
    retrieved: Float[Tensor, " n"]
    """Value of the nearest view; the mean value of ties (bank.TIE_TOLERANCE)."""
    hit: Float[Tensor, " n"]
    """1 where the nearest view is the target; its share among ties."""


def nearest_of_sweep(distances: Float[Tensor, "n n"], norms: Float[Tensor, " n"], series: Sweep) -> SweepResult:
    """Find the view of the series nearest to each prediction. NaN where a distance is not finite."""
    tied = (distances <= distances.amin(1, keepdim=True) + TIE_TOLERANCE * norms).double()
    share = tied / tied.sum(1, keepdim=True)
    values = torch.tensor(series.values, dtype=torch.float64, device=distances.device)
    targets = torch.tensor(series.targets, device=distances.device)
    return SweepResult(distances.argmin(1).cpu(), (share @ values).cpu(), share.gather(1, targets[:, None])[:, 0].cpu())


@torch.no_grad()
def run_sweeps(
    context: EvalContext,
    image: Tensor,
    all_series: Sequence[Sweep],
    settings: SweepSettings,
    generator: torch.Generator,
) -> tuple[Bank, list[tuple[SweepResult, SweepResult]]]:
    """Return one image's bank of all series and, for each series, the results with action and of the control."""
    model, device = context.model, image.device
    bank = embed_bank(model, image, torch.cat([series.views for series in all_series]).to(device), settings.batch_size)
    norms = bank.norms[DISTANCES.index(settings.distance)]

    def distances(sources: Tensor, actions: Tensor) -> Float[Tensor, "s q k"]:
        how: dict[str, Any] = {"distances": (settings.distance,), "encoders": (settings.encoder,)}
        return predicted_distances(model, bank, sources, actions, batch_size=settings.batch_size, **how)[0, 0]

    num_applied = sum(len(series.values) for series in all_series if not series.undo)
    applied = distances(image[None], actions_from(bank.params[:num_applied], model.action_spec)[None])[0]
    views, clean = bank.params[num_applied:], torch.tensor(IDENTITY, device=device).expand_as(bank.params[num_applied:])
    actions = [action_between(source, clean, model.action_spec) for source in (views, clean)]
    undone = distances(bank.views[num_applied:], torch.stack(actions, dim=1))
    results, first = [], 0
    for series in all_series:
        part = slice(first, first + len(series.values))
        if series.undo:
            with_action, control = undone[part.start - num_applied : part.stop - num_applied, :, part].unbind(1)
        else:
            with_action = applied[part, part]
            control = with_action[torch.randperm(len(series.values), generator=generator).to(device)]
        norm = norms[part]
        results.append((nearest_of_sweep(with_action, norm, series), nearest_of_sweep(control, norm, series)))
        first = part.stop
    return bank, results


def correlation(values: Sequence[float], retrieved: Float[Tensor, " n"]) -> float:
    """Return Spearman's rank correlation; 0 where all retrieved values are equal."""
    return 0.0 if (retrieved == retrieved[0]).all() else float(spearmanr(values, retrieved.numpy()).statistic)


def summarise(series: Sweep, results: Sequence[SweepResult]) -> dict[str, Any]:
    """Return mean and deviation of the retrieved values, rank correlation and share of hits, over images."""
    retrieved = torch.stack([result.retrieved for result in results])
    rho = torch.tensor([correlation(series.values, row) for row in retrieved], dtype=torch.float64)
    return {
        "retrieved": retrieved.mean(0).tolist(),
        "deviation": retrieved.std(0).tolist(),
        "correlation": mean_and_stderr(rho),
        "hits": mean_and_stderr(torch.stack([result.hit for result in results]).mean(1)),
    }


def evaluate(context: EvalContext, settings: SweepSettings, output: Path) -> dict[str, Any]:
    """Compute curves and scores of all series, and the figures of some images.

    Raises ConfigError for invalid settings and fewer than two images.
    """
    all_series = make_sweeps(context.config.views, context.model.action_spec.target_flags, settings)
    images, keys = context.first_images(settings.num_images, at_least=2)
    generator = torch.Generator().manual_seed(settings.seed)
    shown = torch.randperm(len(images), generator=generator)[: settings.num_shown].tolist()
    results, figures = [], {}
    for i in track(range(len(images)), "sweeps", transient=True):
        bank, image_results = run_sweeps(context, images[i], all_series, settings, generator)
        results.append(image_results)
        if i in shown:
            figures[i] = figure(keys[i], bank, all_series, image_results, folded=i != shown[0])
    per_series = zip(all_series, zip(*results, strict=True), strict=True)
    return {
        "images": len(images),
        "distance": settings.distance,
        "context": settings.encoder,
        "conditioning": context.config.action.conditioning,
        "series": [_record(series, series_results) for series, series_results in per_series],
        **write_figures([figures[i] for i in shown], output),
    }


def _record(series: Sweep, results: Sequence[tuple[SweepResult, SweepResult]]) -> dict[str, Any]:
    with_action, control = zip(*results, strict=True)
    return {
        "name": series.name,
        "op": series.op,
        "undo": series.undo,
        "trained": series.trained,
        "values": series.values,
        "target": [series.values[i] for i in series.targets],
        "with_action": summarise(series, with_action),
        "control": {"kind": "without action" if series.undo else "shuffled actions", **summarise(series, control)},
    }


def figure(
    key: str, bank: Bank, all_series: Sequence[Sweep], results: Sequence[tuple[SweepResult, SweepResult]], folded: bool
) -> TileFigure:
    """Return the figure of one image: a block for each series, with a column for each value.

    Rows: the view with the value; below it the view nearest to the prediction and, for undo sweeps, the control's.
    """
    blocks, first = [], 0
    for series, (with_action, control) in zip(all_series, results, strict=True):
        views = bank.views[first : first + len(series.values)].cpu()
        first += len(series.values)
        rows = ("source", "nearest", "without action") if series.undo else ("true", "nearest")
        found = (with_action, control) if series.undo else (with_action,)
        blocks.append(
            TileBlock(series.name, [_column(key, series, views, found, rows, i) for i in range(len(views))], rows)
        )
    target = "Undo: the clean image, the first column, should be nearest. " if any(s.undo for s in all_series) else ""
    return TileFigure(
        title=f"Photograph {key}",
        caption=(
            "One column for each value of the parameter: the view with this value and, below it, the view nearest to "
            f"the prediction. {target}Photograph {key}."
        ),
        groups=[TileGroup("", blocks)],
        mark="the nearest view is the target",
        tile_width=56,
        folded=folded,
    )


def _column(
    key: str,
    series: Sweep,
    views: UInt8[Tensor, "n h w 3"],
    found: Sequence[SweepResult],
    rows: Sequence[str],
    i: int,
) -> TileColumn:
    value = change_in_words(series.op, series.values[i])
    words = f"photograph {key}, {series.name}, {value}"
    tiles = [FigureTile(views[i], f"{words}: {rows[0]}")]
    for name, result in zip(rows[1:], found, strict=True):
        nearest = int(result.nearest[i])
        shown = change_in_words(series.op, series.values[nearest])
        tiles.append(FigureTile(views[nearest], f"{words}: {name}, {shown}", marked=nearest == series.targets[i]))
    return TileColumn(value, tuple(tiles))


def change_in_words(op: str, value: float) -> str:
    """Return the value of a parameter as text: '×0.80', '+18°', 'σ 1.2 px', 'on'."""
    return OP_BY_NAME[op].in_words(value)


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the scores of every sweep and of its control."""
    caption = (
        f"{result['images']} images, {result['distance'].replace('_', ' ')}, {result['context']}. "
        "Control: shuffled actions; in undo sweeps, an action that does not describe the source's augmentation. "
        "Exact: share of predictions whose nearest view is the target."
    )
    if result["conditioning"] == "none":
        caption += f" {UNCONDITIONED_NOTE}"
    rows = []
    for series in result["series"]:
        both = (series["with_action"], series["control"])
        scores = [format_mean_stderr(part[score], 2) for score in ("correlation", "hits") for part in both]
        name = series["name"] if series["trained"] else f"{series['name']} (never trained)"
        rows.append([name, *scores, f"{1 / len(series['values']):.2f}"])
    columns = ["series", "correlation", "control", "exact", "control", "chance"]
    return [ResultTable("Parameter sweeps ± standard error", columns, rows, caption)]
