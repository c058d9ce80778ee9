"""The checks of benchmarks/checklist.py: commands, groups, and what each needs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from generated import GENERATED
from mistakes import BenchmarkError

from shards.manifest import MANIFEST

ROOT = Path(__file__).parents[1]
RECIPES = ("iwm_b16_equi_18x384", "iwm_b16_inv_12x384", "iwm_l16_equi_36x512")

GROUPS: dict[str, tuple[str, ...]] = {
    "1": ("data", "train", "parity", "no-waiting"),
    "2": ("step", "all"),
    "3": ("resume", "mrr", "linear", "segmentation"),
    "4": ("pipeline", "step-vit-l", "tune"),
    "5": (
        "step-torch-adamw",
        "default-priority",
        "kernel-by-kernel",
        "colour",
        "step-12x384",
        "step-vit-l-recomputing",
        "evaluation",
    ),
    "6": ("attentive", "finetune-encoder", "finetune-predictor", "finetune-end-to-end", "multitask", "downstream"),
}
"""Checks that one call of nine minutes is meant for, most valuable first."""


LEVERAGED = ("linear", "segmentation", *GROUPS["6"][:-1])
"""Protocols that train on top of the model, all of iwm/evaluate.py's."""


class Check(NamedTuple):
    """One command."""

    words: list[str]
    """Words after `python`."""
    makes: tuple[Path, ...] = ()
    """Files and folders that it writes; removed before it starts."""
    needs: str | None = None
    """Check whose files it reads."""


def checks(out: Path, tiny: bool) -> dict[str, Check]:
    """All checks by name, in the order of GROUPS. out: an absolute path."""
    # Segmentation reads four layers.
    small = "--encoder.width 32 --encoder.depth 4 --encoder.heads 2 --predictor.width 32 --predictor.depth 4"
    small += " --predictor.heads 2 --views.size 64 --encoder.patch 16"
    # The recipe `demo` does not compile, the larger ones do; with one number of threads they share compiled kernels.
    model = [*small.split(), "--train.compile", "--train.threads", "1"] if tiny else []
    batch, recipe = ("8", "demo") if tiny else ("256", RECIPES[0])
    seconds = ["--seconds", "1", "--repeats", "1", "--warmup", "5"] if tiny else ["--seconds", "20"]
    shards, device = str(GENERATED / "shards"), "cuda" if torch.cuda.is_available() else "cpu"
    training = [recipe, "--data.shards", shards, "--data.batch", batch, "--data.val", "None", *model]
    whole = ["--schedule.steps", "20", "--log.every", "5", "--log.checkpoint-every", "10"]
    if not tiny:
        whole = ["--schedule.steps", "200", "--log.every", "5", "--log.checkpoint-every", "100"]
    # Three trainings in one check: only as many steps as a kill between two checkpoints needs.
    killed = ["--schedule.steps", "80", "--log.every", "10", "--log.checkpoint-every", "30"]
    killed += ["--train.deterministic", "--log.no-tensorboard"]

    def throughput(name: str, mode: str, *words: str, more: tuple[Path, ...] = ()) -> Check:
        file = out / f"{name}.json"
        return Check(["benchmarks/throughput.py", mode, *words, "--json", str(file)], (file, *more), "data")

    def model_mode(name: str, recipe: str, *words: str) -> Check:
        return throughput(name, "model", *seconds, "--recipe", recipe, "--data.batch", batch, *model, *words)

    def tests(*which: str) -> Check:
        # Without the suite's own options: its run-time checks of shapes break what a GPU compiles.
        return Check(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra -m 'not long'", *which])

    # A sweep makes dozens of measurements, each of them short.
    sweep = ["--recipe", recipe, "--shards", shards, *["--seconds", "0.2", "--repeats", "1"]]
    if not tiny:
        sweep = ["--recipe", recipe, "--shards", shards, "--repeats", "3"]
    # Nine measurements of 24 s at the mode's defaults; the pipeline on a GPU wants all cores beside it.
    colour = ["--device", device, "--colour", "torchvision", "--cores", str(len(os.sched_getaffinity(0)))]
    colour += ["--seconds", "1" if tiny else "3", "--repeats", "1" if tiny else "3"]

    evaluated = ["--checkpoint", str(out / "run")]
    bank = ["--bank.images", "2", "--bank.size", "8"] if tiny else ["--bank.images", "16"]
    labelled = GENERATED / "labelled"
    leverage = [*evaluated, "--data.shards", str(labelled), "--data.split", "val"]
    # One look at the held-out images, at the end.
    leverage += f"--steps {2 if tiny else 36} --warmup-epochs 0 --validate-every 1000 --log-every 2".split()
    leverage += ["--compile", "yes"]
    own = {name: ["--batch", "8" if tiny else "128"] for name in LEVERAGED}
    own["multitask"] += ["--tasks", "label", f"{labelled}:label"]
    own["segmentation"] = f"--batch {8 if tiny else 16} --channels {8 if tiny else 512} --lrs 1e-5 --classes 2".split()
    own["segmentation"] += ["--parts", "encoder", "predictor"]

    def protocol(name: str, *words: str) -> Check:
        made = out / "run" / "eval"
        return Check(["iwm/evaluate.py", name, *words], (made / name, made / f"{name}.json"), "train")

    pictures = ["--plot", str(out / "all.png"), "--profile", str(out / "profile")]
    parity = ["--images", "32" if tiny else "256", "--json", str(out / "parity.json")]
    tuned = out / "tuned.yaml"
    found = {
        "data": Check(["benchmarks/generated.py"], (ROOT / labelled / MANIFEST,)),
        "train": Check(["iwm/train.py", *training, *whole, "--run-dir", str(out / "run")], (out / "run",), "data"),
        "parity": Check(["benchmarks/parity.py", *parity], (out / "parity.json",), "data"),
        "no-waiting": tests("tests/training/test_no_waiting.py"),
        "step": model_mode("step", recipe, "--baselines"),
        "all": throughput("all", "all", *seconds, "--recipe", recipe, "--data.batch", batch, *model, *pictures,
                          more=(out / "all.png", out / "profile")),
        "resume": Check(["benchmarks/kill_and_compare.py", str(out / "resume"), *training, *killed],
                        (out / "resume",), "data"),
        "mrr": protocol("mrr", *evaluated, "--data.split", "train", *bank),
        "pipeline": tests("tests/dali_pipelines" if not tiny else "tests/dali_pipelines/test_view_loader.py"),
        "step-vit-l": model_mode("step-vit-l", RECIPES[2]),
        "tune": throughput("tune", "tune", *sweep, "--out", str(tuned), more=(tuned,)),
        # Beside `step` and `all` of the same machine: what its other choices would have been.
        "step-torch-adamw": model_mode("step-torch-adamw", recipe, "--optim.kernels", "torch"),
        "default-priority": throughput("default-priority", "end-to-end", *seconds, "--recipe", recipe,
                                       "--data.batch", batch, *model, "--train.no-priority-stream"),
        "kernel-by-kernel": throughput("kernel-by-kernel", "end-to-end", *seconds, "--recipe", recipe,
                                       "--data.batch", batch, *model, "--train.no-cuda-graph"),
        "colour": throughput("colour", "data", *colour),
        "step-12x384": model_mode("step-12x384", RECIPES[1]),
        "step-vit-l-recomputing": model_mode("step-vit-l-recomputing", RECIPES[2], "--train.activation-checkpointing"),
        "evaluation": tests("tests/evaluation" if not tiny else "tests/evaluation/test_mrr.py"),
        "downstream": tests("tests/downstream" if not tiny else "tests/downstream/test_downstream_no_waiting.py"),
        **{name: protocol(name, *leverage, *words) for name, words in own.items()},
    }  # fmt: skip
    return {name: found[name] for group in GROUPS.values() for name in group}


def asked(only: Iterable[str], all_checks: dict[str, Check]) -> list[str]:
    """The checks of these names and groups; no names: all. Raises BenchmarkError for a name that does not exist."""
    names = [name for word in only for name in GROUPS.get(word, (word,))] or list(all_checks)
    for name in names:
        if name not in all_checks:
            known = f"{', '.join(all_checks)}, and the groups {', '.join(GROUPS)}"
            raise BenchmarkError(f"--only {name}: there is none of that name; there are {known}")
    return names


def in_order(names: Iterable[str], all_checks: dict[str, Check]) -> list[str]:
    """These checks, and each that one of them needs before it."""
    found: list[str] = []

    def add(name: str) -> None:
        if name not in found:
            if (needed := all_checks[name].needs) is not None:
                add(needed)
            found.append(name)

    for name in names:
        add(name)
    return found


def all_needed(name: str, all_checks: dict[str, Check]) -> set[str]:
    """The checks that this one needs, directly or through another; none for a name that does not exist."""
    found: set[str] = set()
    check = all_checks.get(name)
    while check is not None and check.needs is not None:
        found.add(check.needs)
        check = all_checks[check.needs]
    return found
