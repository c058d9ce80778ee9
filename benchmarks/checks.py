"""Checks of benchmarks/checklist.py: commands, groups and dependencies."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from environment import BenchmarkError
from synthetic_data import GENERATED

from shards.format import MANIFEST

ROOT = Path(__file__).parents[1]
RECIPES = ("iwm_b16_equi_18x384", "iwm_b16_inv_12x384", "iwm_l16_equi_36x512")

GROUPS: dict[str, tuple[str, ...]] = {
    "1": ("data", "train", "parity", "no-waiting"),
    "2": ("step", "all"),
    "3": ("resume", "mrr", "linear", "segmentation"),
    "4": ("pipeline", "step-vit-l"),
    "5": (
        "tune",
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
"""Checks by group, most valuable first; groups 1 to 4 take one call of nine minutes each."""


DOWNSTREAM = ("linear", "segmentation", *GROUPS["6"][:-1])
"""All downstream protocols of iwm/evaluate.py."""


class Check(NamedTuple):
    """Command of one check."""

    words: list[str]
    """Arguments of `python`."""
    makes: tuple[Path, ...] = ()
    """Files and folders that the check writes; they are removed before it starts."""
    needs: str | None = None
    """Check whose files this one reads."""


def checks(out: Path, tiny: bool) -> dict[str, Check]:
    """Return all checks by name, in the order of GROUPS. out: an absolute path."""
    import torch  # not at the top: options are read without it

    # Depth 4, because segmentation reads four layers.
    small = (
        "--encoder.embed-dim 32 --encoder.depth 4 --encoder.num-heads 2 --predictor.embed-dim 32 --predictor.depth 4"
    )
    small += " --predictor.num-heads 2 --views.size 64 --encoder.patch-size 16"
    # The recipe `demo` does not compile, the larger ones do. With the same number of threads they share compiled
    # kernels.
    model = [*small.split(), "--train.compile", "--train.num-threads", "1"] if tiny else []
    batch, recipe = ("8", "demo") if tiny else ("256", RECIPES[0])
    seconds = ["--seconds", "1", "--repeats", "1", "--warmup", "5"] if tiny else ["--seconds", "20"]
    shards, device = str(GENERATED / "shards"), "cuda" if torch.cuda.is_available() else "cpu"
    training = [recipe, "--data.shards", shards, "--data.global-batch-size", batch, "--data.val", "None", *model]
    whole = ["--schedule.steps", "20", "--log.interval", "5", "--log.checkpoint-interval", "10"]
    if not tiny:
        whole = ["--schedule.steps", "200", "--log.interval", "5", "--log.checkpoint-interval", "100"]
    # One check trains three times, so the number of steps is the minimum for a kill between two checkpoints.
    killed = ["--schedule.steps", "80", "--log.interval", "10", "--log.checkpoint-interval", "30"]
    killed += ["--train.deterministic", "--log.no-tensorboard"]

    def throughput(name: str, mode: str, *words: str, more: tuple[Path, ...] = ()) -> Check:
        file = out / f"{name}.json"
        return Check(["benchmarks/throughput.py", mode, *words, "--json", str(file)], (file, *more), "data")

    def model_mode(name: str, recipe: str, *words: str) -> Check:
        return throughput(
            name, "model", *seconds, "--recipe", recipe, "--data.global-batch-size", batch, *model, *words
        )

    def tests(*which: str) -> Check:
        # Without the test suite's options, because its run-time shape checks break compilation on a GPU.
        return Check(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra -m 'not long'", *which])

    # A sweep takes dozens of short measurements.
    sweep = ["--recipe", recipe, "--shards", shards, *["--seconds", "0.2", "--repeats", "1"]]
    if not tiny:
        sweep = ["--recipe", recipe, "--shards", shards, "--repeats", "3"]
    # The mode's defaults would take nine measurements of 12 s. The pipeline on a GPU needs all cores.
    colour = ["--device", device, "--colour", "torchvision", "--cores", str(len(os.sched_getaffinity(0)))]
    colour += ["--seconds", "1" if tiny else "3", "--repeats", "1" if tiny else "3"]

    evaluated = ["--checkpoint", str(out / "run")]
    bank = ["--bank.num-images", "2", "--bank.num-views", "8"] if tiny else ["--bank.num-images", "16"]
    labelled = GENERATED / "labelled"
    downstream = [*evaluated, "--data.shards", str(labelled), "--data.split", "val"]
    # One validation on the held-out images, at the end.
    downstream += f"--steps {2 if tiny else 36} --warmup-epochs 0 --validate-every 1000 --log-every 2".split()
    downstream += ["--compile", "yes"]
    own = {name: ["--batch-size", "8" if tiny else "128"] for name in DOWNSTREAM}
    own["multitask"] += ["--tasks", "label", f"{labelled}:label"]
    own["segmentation"] = (
        f"--batch-size {8 if tiny else 16} --channels {8 if tiny else 512} --lr 1e-5 --classes 2".split()
    )
    own["segmentation"] += ["--parts", "encoder", "predictor"]

    def protocol(name: str, *words: str) -> Check:
        made = out / "run" / "eval"
        return Check(["iwm/evaluate.py", name, *words], (made / name, made / f"{name}.json"), "train")

    pictures = ["--plot", str(out / "all.png"), "--profile", str(out / "profile")]
    parity = ["--images", "32" if tiny else "256", "--json", str(out / "parity.json")]
    found = {
        "data": Check(["benchmarks/synthetic_data.py"], (ROOT / labelled / MANIFEST,)),
        "train": Check(["iwm/train.py", *training, *whole, "--run-dir", str(out / "run")], (out / "run",), "data"),
        "parity": Check(["benchmarks/parity.py", *parity], (out / "parity.json",), "data"),
        "no-waiting": tests("tests/training/test_no_waiting.py"),
        "step": model_mode("step", recipe, "--baselines"),
        "all": throughput("all", "all", *seconds, "--recipe", recipe, "--data.global-batch-size", batch, *model,
                          *pictures, more=(out / "all.png", out / "profile")),
        "resume": Check(["benchmarks/kill_and_compare.py", str(out / "resume"), *training, *killed],
                        (out / "resume",), "data"),
        "mrr": protocol("mrr", *evaluated, "--data.split", "train", *bank),
        "pipeline": tests("tests/dali_pipelines" if not tiny else "tests/dali_pipelines/test_view_loader.py"),
        "step-vit-l": model_mode("step-vit-l", RECIPES[2]),
        "tune": throughput("tune", "tune", *sweep),
        # Alternatives to compare with `step` and `all` on the same machine.
        "step-torch-adamw": model_mode("step-torch-adamw", recipe, "--optim.implementation", "torch"),
        "default-priority": throughput("default-priority", "end-to-end", *seconds, "--recipe", recipe,
                                       "--data.global-batch-size", batch, *model, "--train.no-priority-stream"),
        "kernel-by-kernel": throughput("kernel-by-kernel", "end-to-end", *seconds, "--recipe", recipe,
                                       "--data.global-batch-size", batch, *model, "--train.no-cuda-graph"),
        "colour": throughput("colour", "data", *colour),
        "step-12x384": model_mode("step-12x384", RECIPES[1]),
        "step-vit-l-recomputing": model_mode("step-vit-l-recomputing", RECIPES[2], "--train.activation-checkpointing"),
        "evaluation": tests("tests/evaluation" if not tiny else "tests/evaluation/test_mrr.py"),
        "downstream": tests("tests/downstream" if not tiny else "tests/downstream/test_downstream_no_waiting.py"),
        **{name: protocol(name, *downstream, *words) for name, words in own.items()},
    }  # fmt: skip
    return {name: found[name] for group in GROUPS.values() for name in group}


def select_checks(only: Iterable[str], all_checks: dict[str, Check]) -> list[str]:
    """Return the checks of these names and groups; no names: all. Raises BenchmarkError for an unknown name."""
    names = [name for word in only for name in GROUPS.get(word, (word,))] or list(all_checks)
    for name in names:
        if name not in all_checks:
            known = f"{', '.join(all_checks)}, and the groups {', '.join(GROUPS)}"
            raise BenchmarkError(f"--only {name}: does not exist; choose from {known}")
    return names


def in_order(names: Iterable[str], all_checks: dict[str, Check]) -> list[str]:
    """Return these checks, each after the checks that it needs."""
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
    """Return the checks that this one needs, directly or indirectly; none for an unknown name."""
    found: set[str] = set()
    check = all_checks.get(name)
    while check is not None and check.needs is not None:
        found.add(check.needs)
        check = all_checks[check.needs]
    return found
