"""Run an ablation study of the paper: STUDY RECIPE [OPTIONS] [-- TRAINING OPTIONS] [-- PROTOCOL OPTIONS] …

Trains every variant with every seed, evaluates it on the bank of its own jitter and on a common bank, and prints tables
in the shape of the paper's with our results and the paper's. Rerun the same command to resume: finished runs are
skipped. Options after `--` are passed to iwm/train.py for every variant, for example

    iwm ablate conditioning demo --seeds 0 1 --jobs 2 -- --data.shards data/photos --schedule.steps 2000

Further `--`, each with the name of a downstream protocol and its options (those of `iwm evaluate`), also train that
protocol on every variant, for the accuracies of table S2 and figure 4:

    iwm ablate augmentation demo -- --data.shards data/photos -- linear -- attentive --epochs 10 -- finetune-predictor
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from iwm.ablation.evaluations import protocol_evaluations, split_sections
from iwm.ablation.studies import AblateOptions
from shards.command_line import run_command


def main(arguments: Sequence[str] | None = None, prog: str = "iwm/ablate.py") -> None:
    """Run a study. arguments: None for those of the program. Raises UserError for what the user can fix."""
    own, training, sections = split_sections(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(AblateOptions, args=own, description=__doc__, prog=prog)
    protocols = protocol_evaluations(sections)
    # Imported late: torch takes seconds to import, and a mistyped option must fail at once.
    from iwm.ablation.ablate import ablate
    from iwm.training.runtime import stop_on_signal

    with stop_on_signal() as stop:
        ablate(options, training, protocols, Console(), stop)


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/ablate.py"))
