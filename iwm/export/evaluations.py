"""Results of RUN/eval that belong to one checkpoint: MRR, and the scores of downstream protocols."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm.report.results import Metric, ProtocolResult, TrialResult, best_choice, read_dataset_results
from iwm.report.runs import RunResults, read_result
from iwm.training.checkpoint import run_dir_of

MRR = "mrr"
"""Name of the evaluator, and of its file in RUN/eval."""


@dataclass(frozen=True)
class DownstreamScore:
    """Score of a protocol's best trial after its last epoch, on one task."""

    record: ProtocolResult
    trial: TrialResult
    task: str
    """Name of the task in `record.tasks`; '' where the protocol has one."""

    @property
    def score(self) -> Metric:
        """Top-1 accuracy, or mIoU for segmentation (0 to 1)."""
        return self.trial.scores[self.task]


@dataclass(frozen=True)
class CheckpointResults:
    """Measurements of one checkpoint."""

    mrr: dict[str, Any] | None = None
    """Result of the MRR evaluation."""
    downstream: tuple[DownstreamScore, ...] = ()


def read_results(checkpoint: Path) -> CheckpointResults:
    """Return the results in RUN/eval that name this checkpoint and are newer than it.

    Results of other projects' encoders are left out. Raises ReportError, which names the file, for a damaged result.
    """
    folder = run_dir_of(checkpoint)
    results = {}
    for path in sorted((folder / "eval").glob("*.json"), key=lambda path: path.stem):
        result = read_result(path)
        named = Path(result.get("checkpoint", "")).name == checkpoint.name
        if named and path.stat().st_mtime >= checkpoint.stat().st_mtime:
            results[path.stem] = result
    run = RunResults(folder, folder.resolve().name, config=None, metrics={}, evaluations=results)
    records = [record for dataset in read_dataset_results(run) for record in dataset.records if record.kind == "iwm"]
    return CheckpointResults(results.get(MRR), tuple(score for record in records for score in _scores(record)))


def _scores(record: ProtocolResult) -> list[DownstreamScore]:
    """Return the scores of the best trial among those that learned every task.

    It has the highest mean over its tasks: on held-out training images, where there are such, or on the held-out split.
    """
    whole = [trial for trial in record.trials if trial.scores.keys() == record.tasks.keys()]
    best = best_choice(whole, lambda trial: sum(score.mean for score in trial.scores.values()))
    return [] if best is None else [DownstreamScore(record, best, task) for task in record.tasks]
