"""The figures that the paper printed and that tables set beside a run's own (Garrido et al., 2024).

All are of ImageNet at 224 px, ViT-B/16, 300 epochs. Scenarios are the names of dali_pipelines.augmentation.SCENARIOS.
"""

from __future__ import annotations

from typing import TypedDict

TABLE_1: dict[str, float] = {"none": 0.00, "sequence": 0.82, "feature": 0.79}
"""MRR by the predictor's conditioning (`action.conditioning`), predictor 18×384."""

TABLE_2: dict[tuple[str, str], float] = {
    ("jitter", "ijepa_12x384"): 0.00,
    ("jitter", "iwm_12x384"): 0.11,
    ("jitter", "iwm_18x384"): 0.25,
    ("default", "ijepa_12x384"): 0.00,
    ("default", "iwm_12x384"): 0.09,
    ("default", "iwm_18x384"): 0.79,
    ("strong", "ijepa_12x384"): 0.00,
    ("strong", "iwm_12x384"): 0.81,
    ("strong", "iwm_18x384"): 0.85,
}
"""MRR by (scenario, predictor). The table's rows are "Jitter", "+ Destructive" and "+ Strong Jitter", in this order."""


class Performance(TypedDict):
    """A row of table S2: MRR, and ImageNet top-1 accuracy in percent of three ways to use the model."""

    mrr: float
    linear: float
    attentive: float
    predictor_finetuning: float


def _performance(mrr: float, linear: float, attentive: float, predictor_finetuning: float) -> Performance:
    return {"mrr": mrr, "linear": linear, "attentive": attentive, "predictor_finetuning": predictor_finetuning}


TABLE_S2: dict[tuple[int, str], Performance] = {
    (12, "default"): _performance(0.09, 74.5, 77.0, 81.3),
    (12, "jitter"): _performance(0.11, 72.1, 76.5, 80.5),
    (12, "more_destructive"): _performance(0.22, 71.0, 74.9, 80.9),
    (12, "strong"): _performance(0.81, 69.3, 75.5, 82.7),
    (12, "strong_jitter"): _performance(0.07, 73.3, 76.3, 80.1),
    (12, "destructive"): _performance(0.02, 72.9, 76.3, 80.7),
    (18, "default"): _performance(0.79, 67.5, 75.1, 83.3),
    (18, "jitter"): _performance(0.25, 70.1, 74.8, 81.4),
    (18, "more_destructive"): _performance(0.85, 56.1, 74.5, 83.1),
    (18, "strong"): _performance(0.85, 34.3, 71.0, 81.7),
    (18, "strong_jitter"): _performance(0.83, 69.2, 75.8, 83.3),
    (18, "destructive"): _performance(0.02, 70.9, 74.8, 81.5),
}
"""By (predictor's depth, scenario); every predictor is 384 wide, destructive ops are of the source alone."""

TABLE_S6: dict[int, float] = {1: 64.5, 8: 64.3, 16: 64.6, 32: 64.6, 128: 64.4}
"""Linear ImageNet top-1 accuracy in percent of the mean of so many predictions (appendix H)."""
