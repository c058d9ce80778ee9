"""Metric logging: plain lines or a live display, a flushed JSON line per measurement, nothing on other processes."""

import io
import json
import math
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iwm.training.loggers import open_files
from iwm.training.metrics import MetricLogger

METRICS = {"loss": 0.25, "images_per_second": 1234.5, "mfu": 0.4, "data_wait": 0.015, "memory_gib": 2.5}


def monitored(run: Path, terminal: bool, main: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    loggers = open_files(run, 0, tensorboard=True) if main else []
    with MetricLogger("a run", 100, 0, main=main, loggers=loggers, console=console) as monitor:
        monitor.print("an opening line")
        monitor.set_step(50)
        monitor.log(50, METRICS)
        monitor.log(50, {"mrr_pooled": 0.31, "rankme": math.nan})
        assert not main or len((run / "metrics.jsonl").read_text().splitlines()) == 2, "lines wait in a buffer"
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    lines = monitored(tmp_path, terminal=False).splitlines()
    assert lines[0] == "an opening line"
    assert lines[1].startswith("step 50/100  loss 0.2500  images_per_second 1,234  mfu 40.0%  data_wait 1.5%")
    assert "left 0:00:0" in lines[1]
    assert "mrr_pooled 0.310" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_a_live_table_and_bar_on_a_terminal(tmp_path: Path) -> None:
    output = monitored(tmp_path, terminal=True)
    assert "\x1b[" in output
    assert "a run" in output
    assert "50/100" in output
    assert "0.310" in output


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    assert monitored(tmp_path, terminal=False, main=False) == ""
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_json_with_null_for_what_is_not_finite_and_reach_tensorboard(tmp_path: Path) -> None:
    monitored(tmp_path, terminal=False)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 50, **METRICS}
    assert second == {"step": 50, "mrr_pooled": 0.31, "rankme": None}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(50, 0.25)]


def test_a_resumed_run_keeps_lines_up_to_its_step_and_no_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"st')
    open_files(tmp_path, 10, tensorboard=False)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
    open_files(tmp_path, 0, tensorboard=False)
    assert path.read_text() == ""


def test_a_resumed_run_hides_in_tensorboard_what_came_after_its_step(tmp_path: Path) -> None:
    for start, steps in ((0, (5, 10, 15)), (10, (20,))):
        for logger in open_files(tmp_path, start, tensorboard=True):
            for step in steps:
                logger.log(step, {"loss": 1.0})
            logger.close(failed=False)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [5, 10, 20]
