"""Selection of the trials that a row of the paper's downstream tables shows."""

from __future__ import annotations

from collections.abc import Callable

from iwm.report.results import DatasetResults, ProtocolResult, SeedScores, TrialResult, best_trials


def is_plain(trial: TrialResult) -> bool:
    """Return True for the paper's protocol: teacher features, null latents, all tokens."""
    return (
        trial.settings.get("features") != "student"
        and trial.settings.get("actions") != "random"
        and trial.settings.get("tokens") != "one"
    )


def finetunes(predictor: str) -> Callable[[TrialResult], bool]:
    """Return a test for trials of the paper's protocol that finetune a predictor, `pretrained` or `random`."""
    return lambda trial: is_plain(trial) and trial.settings.get("predictor") == predictor


def prediction(null: bool, teacher: bool, one: bool) -> Callable[[TrialResult], bool]:
    """Return a test for trials of one prediction task: null latents, teacher features, one token."""
    settings = {
        "predictor": "pretrained",
        "actions": "null" if null else "random",
        "features": "teacher" if teacher else "student",
        "tokens": "one" if one else "all",
    }
    return lambda trial: all(trial.settings.get(name) == value for name, value in settings.items())


def trains(name: str) -> Callable[[TrialResult], bool]:
    """Return a test for trials that train one part of the model."""
    return lambda trial: trial.settings.get("part") == name


def finetuned(dataset: DatasetResults) -> dict[str, SeedScores | None]:
    """Return the best settings by column of tables 4 and S1; None where a column was not run."""
    records = dataset.records
    return {
        "encoder": best_trials(records, "finetune-encoder", lambda trial: True),
        "random": best_trials(records, "finetune-predictor", finetunes("random")),
        "pretrained": best_trials(records, "finetune-predictor", finetunes("pretrained")),
        "end to end": best_trials(records, "finetune-end-to-end", lambda trial: True),
    }


def best_probes(dataset: DatasetResults) -> dict[str, SeedScores | None]:
    """Return the best probe of the paper's protocol by kind, linear and attentive; None where a kind was not run."""
    return {protocol: best_trials(dataset.records, protocol, is_plain) for protocol in ("linear", "attentive")}


def best_of_result(record: ProtocolResult) -> SeedScores | None:
    """Return the best settings of one result of a single task; None where no trial has a score.

    Of finetuned predictors only pretrained ones count. Trials of the paper's protocol come first, others where it has
    none.
    """
    kinds = ("pretrained",) if record.protocol == "finetune-predictor" else ("pretrained", "random", None)
    plain = best_trials(
        [record], record.protocol, lambda trial: is_plain(trial) and trial.settings.get("predictor") in kinds
    )
    return plain or best_trials([record], record.protocol, lambda trial: trial.settings.get("predictor") in kinds)
