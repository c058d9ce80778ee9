"""Registry of evaluators by name; importing it imports neither torch nor DALI.

To add an evaluator, write its options in settings.py (action_settings.py: what asks for actions) and `evaluate` and
`tables` in a file of this folder, and add a line to EVALUATORS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm.evaluation import action_settings
from iwm.evaluation import settings as options
from iwm.evaluation.result_table import ResultTable

if TYPE_CHECKING:
    from iwm.evaluation.common import EvalContext


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of a world model on held-out images, without training it."""

    settings: type[options.EvalSettings]
    """Options of the command."""
    module: str
    """Module of this folder that defines `evaluate` and `tables`. It is imported when one of them is called."""

    def evaluate(self, context: EvalContext, settings: options.EvalSettings, output: Path) -> dict[str, Any]:
        """Evaluate, write figures next to `output`, and return the content of the JSON."""
        result: dict[str, Any] = import_module(self.module).evaluate(context, settings, output)
        return result

    def tables(self, result: dict[str, Any]) -> list[ResultTable]:
        """Return the result as tables."""
        tables: list[ResultTable] = import_module(self.module).tables(result)
        return tables


EVALUATORS: dict[str, Evaluator] = {
    "mrr": Evaluator(options.MRRSettings, "iwm.evaluation.mrr"),
    "retrieval": Evaluator(options.RetrievalSettings, "iwm.evaluation.retrieval"),
    "parameter-sweep": Evaluator(options.SweepSettings, "iwm.evaluation.parameter_sweep"),
    "corruptions": Evaluator(options.CorruptionSettings, "iwm.evaluation.corruptions"),
    "composition": Evaluator(action_settings.CompositionSettings, "iwm.evaluation.composition"),
    "infer-action": Evaluator(action_settings.InferActionSettings, "iwm.evaluation.infer_action"),
    "explorer": Evaluator(options.ExplorerSettings, "iwm.evaluation.explorer"),
    "similarity": Evaluator(options.SimilaritySettings, "iwm.evaluation.similarity"),
    "marginalisation": Evaluator(options.MarginalisationSettings, "iwm.evaluation.marginalisation"),
    "feature-maps": Evaluator(options.FeatureMapSettings, "iwm.evaluation.feature_maps"),
    "knn": Evaluator(options.KNNSettings, "iwm.evaluation.knn"),
}
"""Evaluators in the order in which `world-model` runs them."""

WORLD_MODEL = "world-model"
"""Command that runs all evaluators, and protocol of its result, which lists those that it left out."""
