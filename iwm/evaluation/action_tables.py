"""Tables of inferred actions: one per measure, with the parameters as rows and the methods as columns."""

from __future__ import annotations

from typing import Any

from dali_pipelines.augmentations import OP_BY_NAME
from iwm.evaluation.result_table import ResultTable, format_mean_stderr

TITLES = {"clean": "clean source", "destructive": "sampled source"}
"""Words for the kinds of pairs."""

MEASURES = {
    "error": ("Mean absolute error", 2, 1.0),
    "correlation": ("Rank correlation of inferred and true values", 2, 1.0),
    "within_tenth": ("Right within a tenth of the range of training, %", 0, 100.0),
}
"""Title, decimals and factor of each measure of a parameter."""

FLAGS = ("Was it applied? Balanced accuracy, %", 0, 100.0)

EXPLANATION = (
    "Guess: the middle of the range. Regressor: what the frozen encoder's pooled features tell. Lattice: the nearest "
    "of a fixed number of actions. Student: from the student's features of the source."
)

CONTROL = "Control: the search through the predictor of a run whose actions were shuffled in training."


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the scores of every kind of pairs, one table per measure, and how the searches did."""
    found = []
    for kind, record in result["kinds"].items():
        # The lattice from the student's features is stored only, so that the default tables fit 80 columns.
        methods = {name: scores for name, scores in record["methods"].items() if name != "lattice, student"}
        columns = list(methods)
        parameters, flags = (list(methods["guess"][part]) for part in ("parameters", "flags"))
        caption = (
            f"{TITLES[kind].capitalize()}, {result['images']} images, {record['pairs']} pairs, "
            f"{result['distance'].replace('_', ' ')}. ± standard error over images."
        )
        for measure, (title, digits, times) in MEASURES.items() if parameters else ():
            rows = [
                [
                    in_unit(name) if measure == "error" else name,
                    *(
                        format_mean_stderr(scores["parameters"][name][measure], _digits(name, measure, digits), times)
                        for scores in methods.values()
                    ),
                ]
                for name in parameters
            ]
            control = "" if result["control"] is None else f" {CONTROL}"
            more = f" {EXPLANATION}{control}" if measure == "error" else ""
            found.append(ResultTable(f"{title}, {TITLES[kind]}", ["parameter", *columns], rows, f"{caption}{more}"))
        if flags:
            rows = [
                [
                    name.replace("_", " "),
                    *(
                        format_mean_stderr(scores["flags"][name]["balanced_accuracy"], FLAGS[1], FLAGS[2])
                        for scores in methods.values()
                    ),
                ]
                for name in flags
            ]
            found.append(ResultTable(f"{FLAGS[0]}, {TITLES[kind]}", ["op", *columns], rows, f"{caption} Chance: 50."))
        found.append(_searches(kind, record["searches"]))
    return found


def in_unit(name: str) -> str:
    """Return the name of a parameter with the unit of its changes: 'hue, degrees'."""
    unit = OP_BY_NAME[name].unit
    return f"{name}, {unit.rpartition(', ')[2]}" if unit else name


def _digits(name: str, measure: str, digits: int) -> int:
    return 1 if measure == "error" and OP_BY_NAME[name].unit_scale > 1 else digits


def _searches(kind: str, searches: dict[str, Any]) -> ResultTable:
    rows = [
        [
            name,
            format_mean_stderr(record["nearer"], 0, 100),
            *(format_mean_stderr(record[part], 2) for part in ("found", "true")),
            f"{record['predictions']:.0f}" if "predictions" in record else "",
            f"{record['milliseconds']:.0f}" if "milliseconds" in record else "",
        ]
        for name, record in searches.items()
    ]
    columns = ["search", "nearer than true, %", "distance", "of true action", "predictions per pair", "ms per pair"]
    caption = (
        "Nearer than true: share of the pairs whose answer is nearer than the true action. Near 100, the search does "
        "not fail, and errors are the model's."
    )
    return ResultTable(f"Searches, {TITLES[kind]}", columns, rows, caption)
