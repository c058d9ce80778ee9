"""Rerun a table of the paper, or any comparison: python iwm/ablate.py STUDY RECIPE [OPTIONS] [-- TRAINING OPTIONS]

Trains every arm with every seed, scores each on the bank of its own jitter and on a common one, and prints tables
shaped like the paper's with ours beside the paper's. Given again, it keeps what is finished and goes on where it was
cut; when all is finished it prints the tables. What stands behind `--` goes to iwm/train.py for every arm, for example

    python iwm/ablate.py conditioning demo --seeds 0 1 --jobs 2 -- --data.shards shards/photos --schedule.steps 2000
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from iwm.ablation.runs import AblationError, Run, carry_out, default_threads, plan
from iwm.ablation.studies import STUDIES, Arm, Study, read_study
from iwm.ablation.tables import results, tables
from iwm.config import ConfigError
from iwm.evaluation.mrr import BankSettings, bank_jitter
from iwm.recipes import RECIPES
from iwm.report.markup import section
from iwm.report.page import write_page
from iwm.report.run_folder import ReportError
from iwm.train import parse
from iwm.training.checkpoint import versions
from iwm.training.signals import StopWish, stop_on_signal
from shards.atomic import write_atomically


@dataclass(frozen=True)
class Options:
    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join((*STUDIES, "FILE.yaml")))]
    """`conditioning` (table 1), `complexity` (table 2), `augmentation` (table S2), or a file (docs/ablations.md)."""
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe that every arm starts from."""
    out: Path | None = None
    """Folder of the runs, the tables and the page. Default: runs/ablate-STUDY-RECIPE."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each."""
    common: str = "default"
    """Scenario whose jitter fills the bank that all arms are scored on."""
    jobs: int = 1
    """Runs that train side by side."""
    processes: int = 1
    """Processes of each run (torchrun's --nproc_per_node)."""
    bank: BankSettings = field(default_factory=BankSettings)
    """Banks that runs are scored in; their scenario is the study's affair."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"ablate-{Path(self.study).stem}-{self.recipe}"


def ablate(options: Options, training: Sequence[str], console: Console, wish: StopWish) -> dict[str, Any]:
    """Do what is missing of a study, write OUT/ablation.json, tables.md and report.html, print the tables.

    Returns what ablation.json holds. Raises ConfigError for what cannot be run, before anything is, and AblationError
    where a run failed or was stopped, after the others.
    """
    study = _study(options)
    runs = _checked(options, study, training)
    distinct = list({run.folder: run for run in runs.values()}.values())
    console.print(f"{study.title}: {len(distinct)} runs in {options.folder}, each with its log.txt", soft_wrap=True)
    failures = carry_out(
        distinct, jobs=options.jobs, processes=options.processes, wish=wish,
        say=lambda words: console.print(words, soft_wrap=True, highlight=False),
    )  # fmt: skip
    found = results(study, runs)
    record = {
        "study": study.title,
        "recipe": options.recipe,
        "training": list(training),
        "seeds": list(options.seeds),
        "common": options.common,
        "results": found,
        "versions": versions(),
    }
    grids = tables(study, found, options.common)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "ablation.json", (json.dumps(record, indent=1, default=str) + "\n").encode())
    write_atomically(
        options.folder / "tables.md", "\n".join([f"# {study.title}\n", *(grid.markdown() for grid in grids)]).encode()
    )
    for grid in grids:
        console.print(grid.for_terminal())
    judged = list(dict.fromkeys(Path(result["folder"]) for result in found))
    if judged:
        lead = section(study.title, "".join(grid.html() for grid in grids))
        page = write_page(judged, options.folder / "report.html", lead)
        console.print(f"written: {options.folder / 'tables.md'} and {page}", soft_wrap=True)
    if wish:
        raise AblationError("stopped; the same command goes on from there")
    if failures:
        raise AblationError(f"{len(failures)} of {len(distinct)} runs failed; mend what their logs say and run again")
    return record


def _study(options: Options) -> Study:
    if options.recipe not in RECIPES:
        raise ConfigError(f"'{options.recipe}' is no recipe; choose one of {', '.join(RECIPES)}")
    if options.study in STUDIES:
        return STUDIES[options.study](RECIPES[options.recipe]())
    return read_study(Path(options.study))


def _checked(options: Options, study: Study, training: Sequence[str]) -> dict[tuple[Arm, int], Run]:
    """The runs of the study, their command lines read as iwm/train.py will, so that a mistake shows at once."""
    if options.jobs < 1 or options.processes < 1 or not options.seeds:
        raise ConfigError("--jobs and --processes must be at least 1, and --seeds needs one")
    if options.bank.scenario is not None:
        raise ConfigError("--bank.scenario: arms are scored on their own bank and on --common's; leave it out")
    shared = (*default_threads(options.jobs), *training)
    runs = plan(
        study, options.seeds, out=options.folder, common=options.common, bank=options.bank,
        training=lambda arm: (options.recipe, *shared, *arm.options),
    )  # fmt: skip
    for run in runs.values():
        command = parse(list(run.training))
        command.config.check()
        bank_jitter(command.config.views, options.common)
    return runs


def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = tyro.cli(Options, args=arguments[:cut], description=__doc__, prog="iwm/ablate.py")
    try:
        with stop_on_signal() as wish:
            ablate(options, arguments[cut + 1 :], Console(), wish)
    except (AblationError, ConfigError, ReportError, OSError) as error:
        sys.exit(f"iwm/ablate.py: {error}")


if __name__ == "__main__":
    main()
