"""Registry of evaluators by name.

To add an evaluator, write its settings, `evaluate` and `tables` in a file of this folder and add a line to EVALUATORS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from iwm.evaluation import (
    corruptions,
    explorer,
    feature_maps,
    knn,
    marginalisation,
    mrr,
    parameter_sweep,
    retrieval,
    similarity,
)
from iwm.evaluation.common import EvalContext, EvalSettings
from iwm.evaluation.result_table import ResultTable


class Evaluator(NamedTuple):
    """Evaluation of a world model on held-out images, without gradients."""

    settings: type[EvalSettings]
    """Options of the command."""
    run: Callable[[EvalContext, Any, Path], dict[str, Any]]
    """run(context, settings, output): evaluate, write figures next to `output`, and return the content of the JSON."""
    tables: Callable[[dict[str, Any]], list[ResultTable]]
    """tables(result): return the result as tables."""


EVALUATORS: dict[str, Evaluator] = {
    "mrr": Evaluator(mrr.MRRSettings, mrr.evaluate, mrr.tables),
    "retrieval": Evaluator(retrieval.RetrievalSettings, retrieval.evaluate, retrieval.tables),
    "parameter-sweep": Evaluator(parameter_sweep.SweepSettings, parameter_sweep.evaluate, parameter_sweep.tables),
    "corruptions": Evaluator(corruptions.CorruptionSettings, corruptions.evaluate, corruptions.tables),
    "explorer": Evaluator(explorer.ExplorerSettings, explorer.evaluate, explorer.tables),
    "similarity": Evaluator(similarity.SimilaritySettings, similarity.evaluate, similarity.tables),
    "marginalisation": Evaluator(
        marginalisation.MarginalisationSettings, marginalisation.evaluate, marginalisation.tables
    ),
    "feature-maps": Evaluator(feature_maps.FeatureMapSettings, feature_maps.evaluate, feature_maps.tables),
    "knn": Evaluator(knn.KNNSettings, knn.evaluate, knn.tables),
}
"""Evaluators in the order in which `world-model` runs them."""
