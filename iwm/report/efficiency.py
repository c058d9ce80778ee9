"""Accuracy over the number of trained parameters (figure 3): of one run, and of several runs beside the paper's.

The paper prints figure 3's accuracies in tables S1 and S4, and the number 121M for one model. The other numbers are
counted here, in networks of the printed sizes; those whose predictor has no printed size have only their encoder's
point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from markupsafe import Markup

from iwm.downstream.cost import count_parameters
from iwm.evaluation.paper_results import IJEPA, TABLE_S1, TABLE_S4
from iwm.evaluation.result_table import ResultTable
from iwm.models.backbone import frozen_backbone
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.models.world_model import WorldModel
from iwm.recipes import RECIPES
from iwm.report.components import (
    ChartLine,
    ChartMark,
    chart_card,
    chart_grid,
    details,
    html_table,
    legend,
    line_chart,
    mark_chart,
    paragraphs,
    section,
    unjoined,
)
from iwm.report.results import DatasetResults, SeedScores, read_dataset_results
from iwm.report.runs import RunResults
from iwm.report.table_text import cell, gain, percent
from iwm.report.trial_selection import finetuned

TUNED = {
    "encoder": "encoder",
    "random": "random predictor",
    "pretrained": "pretrained predictor",
    "end to end": "end to end",
}
"""Trained part by column of table 4."""

TUNED_COLUMNS = ["trained", "top-1 %", "chance", "trained parameters", "images/s in training"]

# One run


def efficiency_of(datasets: Sequence[DatasetResults]) -> Markup:
    """Return accuracy over the number of trained parameters; '' with fewer than two scores."""
    charts, compared = [], []
    for dataset in datasets:
        by_column = finetuned(dataset)
        scores = {TUNED[column]: score for column, score in by_column.items() if score is not None}
        if len(scores) < 2:
            continue
        marks = [_mark(TUNED[column], score) for column, score in by_column.items()]
        if any(marks):
            chart = mark_chart(marks, x_title="trained parameters, millions", y_title="accuracy, %")
            charts.append(chart_card(f"Accuracy over trained parameters: {dataset.data}", chart))
        rows = [_tuned(name, score) for name, score in scores.items()]
        compared.append(html_table(ResultTable(dataset.data, TUNED_COLUMNS, rows, _gained(scores))))
    return (chart_grid(Markup().join(charts)) if charts else Markup()) + Markup().join(compared)


def _mark(name: str, score: SeedScores | None) -> ChartMark | None:
    if score is None or score.parameters is None:
        return None
    return ChartMark(name, score.parameters / 1e6, 100 * score.mean, 100 * (score.spread or 0.0))


def _tuned(name: str, score: SeedScores) -> list[str]:
    return [
        name,
        cell(score),
        percent(None if score.task.chance is None else 100 * score.task.chance),
        "" if score.parameters is None else f"{score.parameters:,}",
        "" if score.images_per_second is None else f"{score.images_per_second:,.0f}",
    ]


def _gained(scores: dict[str, SeedScores]) -> str:
    pretrained, random = scores.get(TUNED["pretrained"]), scores.get(TUNED["random"])
    if pretrained is None or random is None:
        return ""
    both = len(pretrained.seeds) > 1 and pretrained.seeds.keys() == random.seeds.keys()
    over = f", mean ± standard deviation over {len(random.seeds)} seeds" if both else ""
    return f"pretrained over random predictor: {gain(pretrained, random)} points{over}"


# Several runs beside the paper's

MEANING = (
    "Each point is a finetuned model. The paper's accuracies are those of tables S1 and S4, on ImageNet after 300 to "
    "1,600 epochs of pretraining. It prints two numbers of parameters, 121M for IWM-Equi 18×384 end to end and 307M "
    "for a ViT-L/16; this project counts {end_to_end:.1f}M and {large:.1f}M. All numbers are counted in networks of "
    "the printed sizes with heads for 1,000 classes. Ours have the heads of their own classes."
)

SIZES = {
    IJEPA: "ijepa_b16_12x384",
    "IWM-Inv 12×384": "iwm_b16_inv_12x384",
    "IWM-Equi 12×384": "iwm_b16_inv_12x384",
    "IWM-Equi 18×384": "iwm_b16_equi_18x384",
}
"""Recipe with the encoder and the predictor of a method in table S1. Other methods have the same encoder."""

LARGE_SIZES = {"IWM-Inv 18×384": "iwm_l16_inv_18x384", "IWM-Equi 36×512": "iwm_l16_equi_36x512"}
"""Recipe with the encoder and the predictor of a method in table S4."""

CLASSES = 1000


@dataclass(frozen=True)
class FinetunedPoint:
    """A finetuned model: the trained part (key of TUNED), trained parameters in millions, and accuracy in percent."""

    part: str
    name: str
    millions: float
    accuracy: float


@cache
def trained_millions(recipe: str) -> dict[str, float]:
    """Return the trained parameters, in millions, of a recipe's model by trained part, with heads for CLASSES."""
    config = RECIPES[recipe]()
    with torch.device("meta"):
        model = WorldModel(config)
        encoder = count_parameters(frozen_backbone(model.target_encoder).finetune_copy())
        predictor = PredictorBackbone(model.predictor)
        attentive = count_parameters(AttentiveHead(predictor.embed_dim, config.encoder.num_heads, CLASSES))
        linear = count_parameters(LinearHead(config.encoder.embed_dim, CLASSES))
    tuned = count_parameters(predictor) + attentive
    counts = {"encoder": encoder + linear, "random": tuned, "pretrained": tuned, "end to end": encoder + tuned}
    return {part: count / 1e6 for part, count in counts.items()}


def paper_points(large: bool) -> list[FinetunedPoint]:
    """Return the paper's models whose trained part has a printed size: table S1, with `large` also S4 (ViT-L/16)."""
    found: list[FinetunedPoint] = []
    for row in TABLE_S1:
        printed = {
            "encoder": row.encoder,
            "random": row.random,
            "pretrained": row.pretrained,
            "end to end": row.end_to_end,
        }
        name, base = f"{row.method}, {row.epochs:,} epochs", "iwm_b16_equi_18x384"
        found += _printed(name, SIZES.get(row.method), base, printed)
    for row_s4 in TABLE_S4 if large else ():
        printed = {"encoder": row_s4.encoder, "pretrained": row_s4.predictor, "end to end": row_s4.end_to_end}
        name, base = f"ViT-L/16 {row_s4.method}, 300 epochs", "iwm_l16_equi_36x512"
        found += _printed(name, LARGE_SIZES.get(row_s4.method), base, printed)
    return found


def _printed(name: str, recipe: str | None, base: str, printed: dict[str, float | None]) -> Iterator[FinetunedPoint]:
    """Yield a method's points. recipe: that of its sizes, None without a predictor's; base: one with its encoder."""
    for part, accuracy in printed.items():
        if accuracy is not None and (recipe is not None or part == "encoder"):
            yield FinetunedPoint(part, name, trained_millions(recipe or base)[part], accuracy)


def efficiency(runs: Sequence[RunResults]) -> Markup:
    """Return accuracy over trained parameters of several runs, for each data set; '' for one run, or no scores."""
    if len(runs) == 1:
        return Markup()
    datasets = [dataset for run in runs for dataset in read_dataset_results(run)]
    large = any(dataset.large for dataset in datasets)
    by_data: dict[str, list[FinetunedPoint]] = {}
    for dataset in datasets:
        by_data.setdefault(dataset.data, []).extend(_own(dataset))
    charts = Markup().join(_chart(data, points, large) for data, points in by_data.items() if points)
    if not charts:
        return Markup()
    about = MEANING.format(
        end_to_end=trained_millions("iwm_b16_equi_18x384")["end to end"],
        large=trained_millions("iwm_l16_equi_36x512")["encoder"],
    )
    return section("Trained parameters and accuracy (figure 3)", paragraphs([about], linked=True) + charts)


def _own(dataset: DatasetResults) -> Iterator[FinetunedPoint]:
    for part, score in finetuned(dataset).items():
        if score is not None and score.parameters is not None:
            yield FinetunedPoint(part, dataset.name, score.parameters / 1e6, 100 * score.mean)


def _chart(data: str, ours: Sequence[FinetunedPoint], large: bool) -> Markup:
    sources = {"ours": ours, "paper": paper_points(large)}
    lines = [_line(who, part, points) for who, points in sources.items() for part in TUNED]
    most = max(point.millions for points in sources.values() for point in points)
    chart = line_chart(
        lines, x_range=(0.0, 1.05 * most), x_title="trained parameters, millions", y_title="top-1 accuracy, %"
    )
    keys = legend([line.name for line in lines], joined=False)
    rows = [
        [f"{who}: {point.name}", TUNED[point.part], f"{point.millions:.2f}", percent(point.accuracy)]
        for who, points in sources.items()
        for point in sorted(points, key=lambda point: point.millions)
    ]
    columns = ["", "trained", "trained parameters, millions", "top-1 %"]
    table = html_table(ResultTable(f"Points of the chart: {data}", columns, rows))
    card = chart_card(f"Accuracy over trained parameters: {data}", chart, keys=keys)
    return chart_grid(card) + details("The points as a table", table)


def _line(who: str, part: str, points: Sequence[FinetunedPoint]) -> ChartLine:
    chosen = [(point.name, point.millions, point.accuracy) for point in points if point.part == part]
    return unjoined(f"{who}: {TUNED[part]}", chosen)
