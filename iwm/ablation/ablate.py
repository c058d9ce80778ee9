"""A whole ablation study: its runs, their results, tables and page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from iwm.ablation.evaluations import Evaluation
from iwm.ablation.protocol_tables import correlation_record
from iwm.ablation.runs import AblationError, PlannedRun, is_finished, plan, run_all, threads_per_job
from iwm.ablation.studies import STUDIES, AblateOptions, AblationStudy, Variant
from iwm.ablation.tables import results, tables
from iwm.config import ConfigError, DataConfig
from iwm.evaluation.features import match_classes
from iwm.evaluation.settings import bank_augmentation
from iwm.ranges import check_ranges
from iwm.recipes import RECIPES
from iwm.report.components import html_table, section
from iwm.report.page import write_page
from iwm.report.results import SEGMENTATION
from iwm.train_options import parse
from iwm.training.checkpoint import versions
from iwm.training.held_out import held_out_split
from iwm.training.runtime import StopFlag
from shards.atomic import write_atomically
from shards.format import list_splits, load_manifest
from shards.hold_out import VAL
from shards.urls import is_url


def ablate(
    options: AblateOptions, training: Sequence[str], protocols: Sequence[Evaluation], console: Console, stop: StopFlag
) -> dict[str, Any]:
    """Run the unfinished runs of a study, write OUT/ablation.json, tables.md and report.html, and print the tables.

    Returns the content of ablation.json; with `only` or `list_runs`, which write none, an empty one. Raises ConfigError
    for invalid options before any run starts, and AblationError after all runs if one failed or the study was stopped.
    """
    study = _study(options)
    runs = _checked(options, study, training, protocols)
    distinct = list({run.folder: run for run in runs.values()}.values())
    console.print(
        f"{study.title}: {len(distinct)} runs in {options.folder}; log of each run: log.txt",
        soft_wrap=True,
    )

    def say(words: str) -> None:
        console.print(words, soft_wrap=True, highlight=False)

    if options.list_runs:
        for number, run in enumerate(distinct, start=1):
            say(f"{number} {run.name}{': finished' if is_finished(run) else ''}")
        return {}
    chosen = distinct if options.only is None else [_only(distinct, options.only)]
    failures = run_all(chosen, jobs=options.jobs, processes=options.processes, stop=stop, log=say)
    if options.only is not None:
        _raise_failures(failures, chosen, stop)
        say("the tables come with the whole study: run the command without --only")
        return {}
    records, names = results(study, runs), [item.protocol for item in protocols]
    record = {
        "study": study.title,
        "recipe": options.recipe,
        "training": list(training),
        "seeds": list(options.seeds),
        "common": options.common,
        "protocols": {item.protocol: list(item.options) for item in protocols},
        "correlation": correlation_record(study, records, names),
        "results": records,
        "versions": versions(),
    }
    study_tables = tables(study, records, options.common, names)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(options.folder / "ablation.json", (json.dumps(record, indent=1, default=str) + "\n").encode())
    write_atomically(
        options.folder / "tables.md",
        "\n".join([f"# {study.title}\n", *(table.markdown() for table in study_tables)]).encode(),
    )
    for table in study_tables:
        console.print(table)
    evaluated = list(dict.fromkeys(Path(item["folder"]) for item in records))
    if evaluated:
        lead = section(study.title, Markup().join(map(html_table, study_tables)))
        page = write_page(evaluated, options.folder / "report.html", lead)
        console.print(f"written: {options.folder / 'tables.md'} and {page}", soft_wrap=True)
    _raise_failures(failures, chosen, stop)
    return record


def _only(runs: Sequence[PlannedRun], number: int) -> PlannedRun:
    """Return a run by its number, from 1. Raises ConfigError where the study has fewer."""
    if number > len(runs):
        raise ConfigError(f"--only {number}: the study has {len(runs)} runs; --list-runs lists them")
    return runs[number - 1]


def _raise_failures(failures: Sequence[str], runs: Sequence[PlannedRun], stop: StopFlag) -> None:
    """Raise AblationError where the study was stopped or runs failed."""
    if stop:
        raise AblationError("stopped; rerun the same command to resume")
    if failures:
        raise AblationError(
            f"{len(failures)} of {len(runs)} runs failed; fix the errors in their logs and rerun the command"
        )


def _study(options: AblateOptions) -> AblationStudy:
    if options.recipe not in RECIPES:
        raise ConfigError(f"RECIPE: '{options.recipe}' is not a recipe; choose one of {', '.join(RECIPES)}")
    if options.study not in STUDIES:
        raise ConfigError(f"STUDY: '{options.study}' is not a study; choose one of {', '.join(STUDIES)}")
    return STUDIES[options.study](RECIPES[options.recipe]())


def _checked(
    options: AblateOptions, study: AblationStudy, training: Sequence[str], protocols: Sequence[Evaluation]
) -> dict[tuple[Variant, int], PlannedRun]:
    """Plan the runs and parse their command lines as iwm/train.py does, so that errors appear before any run starts.

    Shards are looked at only for unfinished runs.
    """
    check_ranges(options)
    if not options.seeds:
        raise ConfigError("--seeds: name at least one seed")
    shared = (*threads_per_job(options.jobs), *training)
    runs = plan(
        study, options.seeds, out=options.folder, common=options.common, bank=options.bank, protocols=protocols,
        training=lambda variant: (options.recipe, *shared, *variant.options),
    )  # fmt: skip
    needed = set()
    for run in runs.values():
        command = parse(list(run.training))
        command.config.check()
        bank_augmentation(command.config.views, options.common, "--common")
        if not is_finished(run):
            needed.add(command.config.data)
    for data in needed:
        load_manifest(data.folder, data.train)
        if held_out_split(data) is None:
            raise ConfigError(
                f"--data.val {data.val}: a study is evaluated on held-out images; name a split of {data.shards} "
                f"({', '.join(list_splits(data.folder))}) with -- --data.val NAME, or make the shards with "
                "--val-fraction 0.05"
            )
        for protocol in protocols:
            _check_labels(data, protocol)
    return runs


def _check_labels(data: DataConfig, protocol: Evaluation) -> None:
    """Raise ConfigError where the data of a protocol that classifies lack its splits or its label column.

    Shards at a URL that differ from the training's are not looked at.
    """
    own = protocol.settings["data"]
    if protocol.protocol == SEGMENTATION or (own["shards"] is not None and is_url(own["shards"])):
        return
    folder = data.folder if own["shards"] is None else Path(own["shards"])
    train, held_out = own["train"] or data.train, own["split"] or data.val or VAL
    options = (f"-- {protocol.protocol} {option}" for option in ("--data.train", "--data.label"))
    match_classes(folder, train, held_out, own["label"], *options)
