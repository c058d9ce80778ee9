"""What predictions look like: the pictures that retrieval drew."""

from __future__ import annotations

from typing import Any

from iwm.evaluation.bank import UNTOLD
from iwm.report.markup import details, figure, section
from iwm.report.run_folder import Run


def retrieval_picture(run: Run) -> str:
    """What predictions retrieve: at random, and, folded away, each photograph's best and worst."""
    parts = [_pictures(run, result) for result in run.of_protocol("retrieval").values()]
    return section("What the predictions look like", "".join(parts)) if parts else ""


def _pictures(run: Run, result: dict[str, Any]) -> str:
    folder, bank = run.folder / "eval", result["bank"]
    caption = (
        f"The predictor is told an action; of {bank} jittered copies, the one nearest to its output is shown beside "
        f"the true one. Chosen at random, seed {result['seed']}."
    )
    if result.get("conditioning") == "none":
        caption += f" {UNTOLD}"
    alt = "photographs, what was retrieved, and the truth"
    chosen = figure(folder / result["picture"], alt, caption)
    if "extremes" not in result:  # of a file written before there were any
        return chosen
    caption = f"Not chosen at random: the best and the worst of all {bank} predictions for each of these photographs."
    extremes = figure(folder / result["extremes"]["picture"], alt, caption)
    return chosen + details("Each photograph's best and worst", extremes)
