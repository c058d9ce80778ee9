"""W&B (log.wandb_project), with the real package: one W&B run, with all steps, however a run was stopped.

Nothing is sent: W&B's mode is offline, or its server cannot be reached.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from iwm.config import Config, ConfigError
from iwm.config_io import to_dict
from iwm.train_config import LogConfig
from iwm.train_options import parse
from iwm.training.wandb_logger import WandbLogger, check_wandb
from tests.training.runs import ENVIRONMENT, ROOT, arguments, command, metrics, start, wait_until
from tests.training.test_resume import wait_for_step

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed (extra wandb)")
PROJECT = ("--log.wandb-project", "a-project")
CONFIG = Config(log=LogConfig(wandb_project="a-project"))


@needs_wandb
def test_a_killed_and_a_stopped_training_are_one_run_with_every_step(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.wandb_files import read_wandb

    monkeypatch.setitem(ENVIRONMENT, "WANDB_MODE", "offline")
    run, options = tmp_path / "a-run", (100_000, "--data.val", "None", *PROJECT)
    killed = start(command(tiny_shards, run, *options))
    wait_until(lambda: any(row["step"] > 10 for part in read_wandb(run) for row in part.rows), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = metrics(run)
    stopped = start(command(tiny_shards, run, *options))
    wait_for_step(run, before[-1]["step"] + 5, stopped)
    os.killpg(stopped.pid, signal.SIGTERM)
    output = stopped.communicate(timeout=600)[0]
    assert stopped.returncode == 0, output

    first, second = read_wandb(run)
    assert first.run_id == second.run_id == (run / "wandb_id").read_text()
    assert (second.project, second.name, second.exit_code) == ("a-project", "a-run", 0)
    assert first.step_metrics == second.step_metrics == {"*": "step"}
    written = json.loads(json.dumps(to_dict(parse(arguments(tiny_shards, run, *options)).config)))
    assert first.config == second.config == written
    # A kill may cost the rows of a second. Each start has its own rows, so a step may be in both.
    again = second.rows[0]["step"]
    assert first.rows == before[: len(first.rows)]
    assert second.rows == [row for row in metrics(run) if row["step"] >= again]
    assert {row["step"] for row in first.rows + second.rows} == {row["step"] for row in metrics(run)}


UNREACHABLE = """
from pathlib import Path
from tests.training.test_wandb import CONFIG
from iwm.training.wandb_logger import check_wandb, open_wandb
check_wandb(CONFIG.log)
logger = open_wandb(CONFIG, Path("{run}"))
logger.log(5, {{"loss": 0.5}})
logger.close(failed=True)
"""


@needs_wandb
def test_a_server_that_cannot_be_reached_leaves_the_run_in_its_folder(tmp_path: Path) -> None:
    from tests.training.wandb_files import read_wandb

    # Port 9 of this machine, where nothing listens.
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    patience = {"WANDB_INIT_TIMEOUT": "1", "WANDB_X_GRAPHQL_TIMEOUT_SECONDS": "1", "WANDB_X_GRAPHQL_RETRY_MAX": "0"}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE.format(run=tmp_path)],
        cwd=ROOT, env={**ENVIRONMENT, **server, **patience}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stdout.splitlines() if line.startswith("WARNING"))
    assert "W&B cannot be reached" in warning
    assert f"wandb sync {next((tmp_path / 'wandb').glob('offline-run-*'))}" in warning
    last = read_wandb(tmp_path)[-1]
    assert (last.rows, last.exit_code) == ([{"step": 5, "loss": 0.5}], 1)
    assert last.run_id == (tmp_path / "wandb_id").read_text()


@needs_wandb
def test_training_does_not_begin_without_a_login(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The home folder is empty, so that no login of this machine is found."""
    monkeypatch.delitem(ENVIRONMENT, "WANDB_API_KEY", raising=False)
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path)}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    process = start(command(tiny_shards, tmp_path / "run", 5, *PROJECT))
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("iwm/train.py: log.wandb_project a-project: not logged in to W&B; run `wandb login`")
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed .*; pip install 'iwm\[wandb\]'"):
        check_wandb(CONFIG.log)


@needs_wandb
def test_an_invalid_variable_of_wandb_is_one_line() -> None:
    program = "from tests.training.test_wandb import CONFIG, check_wandb; check_wandb(CONFIG.log)"
    line = [sys.executable, "-c", program]
    done = subprocess.run(
        line, cwd=ROOT, env={**ENVIRONMENT, "WANDB_MODE": "bogus"}, capture_output=True, text=True, timeout=600
    )
    assert "ConfigError: log.wandb_project: an environment variable WANDB_… is invalid" in done.stderr
    assert "Input should be 'online', 'offline'" in done.stderr


def test_an_entity_without_a_project_is_refused() -> None:
    check_wandb(LogConfig())
    with pytest.raises(ConfigError, match=r"log\.wandb_entity a-team: .*add --log\.wandb-project"):
        check_wandb(LogConfig(wandb_entity="a-team"))


@needs_wandb
def test_metrics_are_ignored_with_one_warning_after_the_process_of_wandb_died(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken:
        def define_metric(self, name: str, step_metric: str) -> None:
            pass

        def log(self, row: dict[str, float]) -> None:
            raise ConnectionResetError("Connection lost")

    logger = WandbLogger(Broken())
    logger.log(1, {"loss": 0.5})
    logger.log(2, {"loss": 0.5})
    logger.close(failed=False)
    assert capsys.readouterr().out.count("WARNING: W&B stopped (Connection lost)") == 1
