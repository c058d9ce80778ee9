"""What predictions look like: the pictures that evaluations drew."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from iwm.report.markup import section
from iwm.report.run_folder import Run


def retrieval_picture(run: Run) -> str:
    """What predictions retrieve."""
    figures = [
        _figure(run.folder / "eval" / result["picture"], result) for result in run.of_protocol("retrieval").values()
    ]
    return section("What the predictions look like", "".join(figures)) if figures else ""


def _figure(picture: Path, result: dict[str, Any]) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<figure><img alt="photographs, what was retrieved, and the truth" src="data:image/png;base64,{data}">'
        f"<figcaption>The predictor is told an action; of {result['bank']} jittered copies, the one nearest to its "
        f"output is shown beside the true one. Chosen at random, seed {result['seed']}.</figcaption></figure>"
    )
