"""The benchmark's modes that train, on a tiny model and real shards: what they measure, print, draw and refuse."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import throughput
import torch
from step_modes import (
    measure_data,
    measure_end_to_end,
    measure_interference,
    measure_model,
    measure_updates,
    open_subject,
    resident_batches,
    token_counts,
)
from stopwatch import Window, compiled_graphs, forget_peak, peak_gib
from turns import Measured, interleave, ratio
from verdict import limit, ratios

from dali_pipelines.loader import Batch
from iwm.training.session import Session
from tests.training.runs import ROOT, TINY, alone, tiny_config

MODEL = [word for key, value in TINY.items() if not key.startswith("log") for word in (f"--{key}", str(value))]
BRIEF = ("--seconds", "0.1", "--repeats", "2", "--warmup", "2")


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """benchmarks/throughput.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    return throughput.main()


@pytest.fixture(scope="module")
def everything(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what mode `all` writes: all.json, all.svg and a trace."""
    out = tmp_path_factory.mktemp("all")
    files = ("--json", out / "all.json", "--plot", out / "all.svg", "--profile", out / "trace")
    with pytest.MonkeyPatch.context() as patch:
        line = ("all", "--recipe", "demo", "--shards", tiny_shards, *MODEL, *BRIEF, "--no-baselines", *files)
        assert run(patch, *line) == 0
    return out


def test_all_measures_every_mode_and_its_figures_agree_with_each_other(everything: Path) -> None:
    result = read(everything / "all.json")
    modes = result["modes"]
    assert list(modes) == ["data", "model", "interference", "end-to-end"]
    flops = sum(result["flops_per_image"].values())
    for name, mode in modes.items():
        assert mode["steps"] >= 2 * 5
        assert 0 < mode["step_ms"]["p10"] <= mode["step_ms"]["median"] <= mode["step_ms"]["p90"]
        assert 0 < min(mode["turns"]) <= max(mode["turns"])
        assert mode["images_per_second"]["median"] == pytest.approx(np.median(mode["turns"]), rel=1e-3)
        assert mode["memory_gib"] > 0.1
        if name == "data":
            assert mode["mfu"] is None
        else:
            attained = np.median(mode["turns"]) * flops
            assert mode["mfu"] == pytest.approx(attained / result["peak_flops"]["median"], rel=1e-3)
        # All steps of all turns, over all their time, is between the slowest and the fastest turn.
        assert min(mode["turns"]) * 0.999 <= 8 * mode["steps"] / mode["seconds"] <= max(mode["turns"]) * 1.001
    assert 0 < modes["end-to-end"]["data_wait"] < 1
    assert modes["model"]["data_wait"] == 0
    expected = [c / b for c, b in zip(modes["end-to-end"]["turns"], modes["model"]["turns"], strict=True)]
    assert result["ratios"]["end_to_end"]["median"] == pytest.approx(np.median(expected), rel=1e-3)
    assert result["limit"].endswith(".")


def test_the_json_says_on_what_and_with_what_it_was_measured(everything: Path) -> None:
    result = read(everything / "all.json")
    assert result["mode"] == "all"
    assert result["recipe"] == "demo"
    assert result["settings"] == {"seconds": 0.1, "repeats": 2, "warmup": 2}
    assert result["config"]["data"]["batch"] == 8
    assert result["config"]["encoder"]["width"] == 32
    assert {"processor", "cores", "packages", "commit"} <= set(result["machine"])
    assert result["recompilations"] == 0
    assert 0 < result["warm_up"]["first_step_seconds"] < result["warm_up"]["seconds"]
    assert set(result["updates"]) == {"optimiser", "ema"}
    assert all(ms["median"] > 0 for ms in result["updates"].values())


def test_the_picture_shows_every_stage(everything: Path) -> None:
    picture = (everything / "all.svg").read_text()
    for stage in ("pipeline alone", "model alone", "model beside the pipeline", "end to end", "images per second"):
        assert f"<!-- {stage}" in picture, stage


def test_the_profile_is_a_trace_and_the_ten_most_expensive_operators(everything: Path) -> None:
    with gzip.open(everything / "trace" / "trace-0.json.gz") as file:
        assert json.load(file)["traceEvents"]
    operators = read(everything / "all.json")["operators"]
    assert len(operators) == 10
    shares = [operator["share"] for operator in operators]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert any("mm" in operator["name"] for operator in operators)


@pytest.mark.parametrize("mode", ["model", "end-to-end", "interference"])
def test_a_mode_measures_what_it_is_named_for(
    mode: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    more = ("--baselines",) if mode == "model" else ()
    line = (mode, "--shards", tiny_shards, *MODEL, *BRIEF, "--repeats", 1, "--json", file, *more)
    assert run(monkeypatch, *line) == 0
    modes = read(file)["modes"]
    printed = capsys.readouterr().out
    assert mode in modes
    assert all(name in printed and entry["mfu"] > 0 for name, entry in modes.items())
    if mode == "model":
        # I-JEPA's step truncates and predicts block by block: other FLOPs, which its MFU is taken over.
        assert len(modes) == 3
        assert len({entry["flops_per_image"] for entry in modes.values()}) == 2


@pytest.mark.long
def test_under_torchrun_the_first_process_reports_the_images_of_all(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    options = ["end-to-end", "--shards", tiny_shards, *MODEL, *BRIEF, "--json", file]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, ROOT / "benchmarks" / "throughput.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images/s") == 1
    result = read(file)
    mode = result["modes"]["end-to-end"]
    assert result["processes"] == 2
    # Both processes take every step together, 4 of its 8 images each.
    assert 8 * mode["steps"] / mode["seconds"] == pytest.approx(np.mean(mode["turns"]), rel=0.3)


@pytest.mark.long
def test_all_sets_the_pipeline_beside_its_limit_its_rivals_and_its_own_parts(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--json", tmp_path / "all.json", "--plot", tmp_path / "all.png")
    assert run(monkeypatch, "all", "--shards", tiny_shards, *MODEL, *BRIEF, *files) == 0
    result = read(tmp_path / "all.json")
    limits = result["pipeline_limits"]
    assert set(limits) == {"torchvision pil", "torchvision tensor", "JPEG decode alone"}
    assert limits["JPEG decode alone"]["core"]["median"] > limits["torchvision pil"]["core"]["median"]
    assert {"read", "decode", "crop and resize"} < set(result["pipeline_stages"])
    assert result["pipeline_stages"]["decode"]["median"] > 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def session(tiny_shards: Path) -> Session:
    return open_subject(tiny_config(tiny_shards, steps=100), alone())


class Counted:
    """The session's loader, counting its batches and, if asked, slow."""

    def __init__(self, loader: Iterator[Batch], seconds: float = 0.0) -> None:
        self.loader, self.seconds, self.taken = loader, seconds, 0

    def __next__(self) -> Batch:
        time.sleep(self.seconds)
        self.taken += 1
        return next(self.loader)


def counted(session: Session, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> Counted:
    loader = Counted(session.loader, seconds)
    monkeypatch.setattr(session, "loader", loader)
    return loader


def test_each_mode_runs_the_part_of_training_that_it_measures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, loader = resident_batches(session), counted(session, monkeypatch)

    def used(measure: Callable[[], Window]) -> tuple[int, int, int]:
        step, taken = session.step, loader.taken
        return len(measure().steps), session.step - step, loader.taken - taken

    assert used(lambda: measure_data(session, 6)) == (6, 0, 6)
    assert used(lambda: measure_model(session, batches, 6)) == (6, 6, 0)
    assert used(lambda: measure_end_to_end(session, 6)) == (6, 6, 6)
    measured, steps, made = used(lambda: measure_interference(session, batches, 6))
    assert (measured, steps) == (6, 6)
    assert 0 < made <= 6, "beside the model the pipeline makes what its steps would use, no more"


def test_waiting_for_data_slows_training_and_not_the_model_beside_the_pipeline(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = resident_batches(session)
    loader = counted(session, monkeypatch, seconds=0.3)
    trained = measure_end_to_end(session, 5)
    assert trained.waited > 5 * 0.3
    assert trained.seconds > trained.waited
    beside = measure_interference(session, batches, 5)
    assert beside.seconds < trained.waited / 2
    assert loader.taken < 10


def test_an_error_of_the_pipeline_beside_the_model_is_not_lost(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = resident_batches(session)
    monkeypatch.setattr(session, "loader", iter(()))
    with pytest.raises(StopIteration):
        measure_interference(session, batches, 2)


def test_measuring_optimiser_and_ema_leaves_the_parameters_as_they_are(session: Session) -> None:
    measure_model(session, resident_batches(session), 1)
    before = [p.detach().clone() for p in (*session.model.encoder.parameters(), *session.model.predictor.parameters())]
    windows = measure_updates(session, 3)
    assert {name: len(window.steps) for name, window in windows.items()} == {"optimiser": 3, "ema": 3}
    after = [*session.model.encoder.parameters(), *session.model.predictor.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_tokens_are_counted_as_masks_have_them(session: Session) -> None:
    counts = token_counts(session, steps=3)
    n = session.config.grid**2
    assert 0 < counts["context_encoder"]["needed"] <= counts["context_encoder"]["processed"] < n
    assert counts["predictor"] == counts["target_encoder"] == {"processed": n, "needed": n}


def test_turns_are_taken_in_rounds_and_measurements_last_as_long_as_asked() -> None:
    order: list[tuple[str, int]] = []

    def way(name: str, seconds: float) -> Measured:
        def window(steps: int) -> Window:
            order.append((name, steps))
            return Window([seconds] * steps, cpu_seconds=2 * seconds * steps)

        return Measured(window, images=4)

    rounds: list[int] = []
    turns = interleave(
        {"quick": way("quick", 0.01), "slow": way("slow", 0.5)},
        alone(),
        seconds=3.0,
        repeats=2,
        settling=3,
        between=lambda: rounds.append(len(order)),
        say=lambda text: None,
    )
    first = [("quick", 3), ("quick", 3), ("quick", 150), ("slow", 3), ("slow", 3), ("slow", 5)]
    assert order == [*first, ("quick", 3), ("quick", 150), ("slow", 3), ("slow", 5)]
    assert rounds == [6, 10]
    assert [turn.images_per_second for turn in turns["quick"]] == pytest.approx([400, 400])
    assert [turn.images_per_cpu_second for turn in turns["quick"]] == pytest.approx([200, 200])


def test_memory_is_counted_from_where_it_was_forgotten() -> None:
    here = torch.device("cpu")
    forget_peak(here)
    before = peak_gib(here)
    # Not by torch: its allocator, and malloc, may keep what is freed.
    with mmap(-1, 2**29) as held:
        for _ in range(2**9):
            held.write(b"1" * 2**20)
        forget_peak(here)
        assert peak_gib(here) > before + 0.4
    assert peak_gib(here) > before + 0.4
    forget_peak(here)
    assert peak_gib(here) < before + 0.2


def test_a_recompilation_is_counted() -> None:
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    before = compiled_graphs()
    double(torch.ones(3))
    assert compiled_graphs() == before
    double(torch.ones(4))
    assert compiled_graphs() == before + 1


def test_ratios_are_taken_turn_by_turn() -> None:
    assert ratio([200, 50], [100, 100]) == {"median": 1.25, "lowest": 0.5, "highest": 2.0}
    found = ratios({"data": [300, 30], "model": [100, 10], "interference": [90, 9], "end-to-end": [45, 9]})
    assert found["end_to_end"] == {"median": 0.675, "lowest": 0.45, "highest": 0.9}
    assert found["interference"]["median"] == 0.9
    assert found["starvation"] == {"median": 0.25, "lowest": 0.0, "highest": 0.5}
    assert found["headroom"]["median"] == 3.0


@pytest.mark.parametrize(
    ("rates", "on_gpu", "says"),
    [
        ((5000, 2400, 2350, 2300), True, "the model: alone the pipeline makes 5,000 images/s"),
        ((1500, 2400, 2300, 1450), True, "the pipeline: training waits for it 37% of the time"),
        ((5000, 2400, 1900, 1850), True, "both share the machine: the pipeline's work costs the model 21%"),
        ((9000, 1000, 900, 890), False, "the model, with 90% of the cores' time"),
        ((1000, 800, 500, 440), False, "both share the cores, 44% of their time for the pipeline"),
        ((250, 1000, 500, 200), False, "the pipeline, with 80% of the cores' time"),
    ],
)
def test_one_sentence_says_what_limits_the_machine(rates: tuple[float, ...], on_gpu: bool, says: str) -> None:
    named = dict(zip(("data", "model", "interference", "end-to-end"), rates, strict=True))
    sentence = limit(named, None if on_gpu else named)
    assert sentence.startswith(says), sentence


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("all", "--recipe", "cake"), "--recipe cake: there is none of that name; there are demo"),
        (("model", "--scenario", "purple"), "--scenario purple: there is none of that name; there are default"),
        (("all", "--plot", "picture.bmp"), "--plot picture.bmp: the name must end in .png or .svg"),
        (("model", "--repeats", "0"), "--repeats 0: must be at least 1"),
        (("model", "--seconds", "0"), "--seconds 0.0: must be positive"),
        (("end-to-end", "--views.size", "33"), "views.size 33 is not a multiple of encoder.patch 8"),
        (("model", "--data.batch", "101"), "--data.batch 101: .* has only 100 images in 'train'"),
        (("model", "--json", "/dev/null/result.json"), "--json /dev/null/result.json: its folder cannot be made"),
        (("model", "--tuned", "missing.yaml"), "--tuned missing.yaml: it cannot be read"),
        (("model", "--train.device", "cuda"), "train.device cuda: torch sees no GPU"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    mistake: tuple[str, ...],
    message: str,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available() and "cuda" in mistake:
        pytest.skip("this machine has a GPU")
    assert run(monkeypatch, *mistake, "--shards", tiny_shards) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("benchmarks/throughput.py: ")
    assert re.search(message, errors[0]), errors[0]
