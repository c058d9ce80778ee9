"""The model's rate, measured by `throughput.py model` in a process that ends and leaves the GPU free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mistakes import BenchmarkError
from rich.console import Console
from tune_candidates import LoaderSetup

BRIEF = ("--seconds", "5", "--repeats", "1", "--warmup", "10")


def model_rate(recipe: str, work: LoaderSetup, console: Console) -> float:
    """Images/s of one process's training steps on resident batches. Raises BenchmarkError where they fail."""
    with TemporaryDirectory() as folder, console.status("the model's rate"):
        file = Path(folder) / "model.json"
        data = ("--shards", work.folder, "--data.train", work.split, "--data.batch", work.batch)
        words = (Path(__file__).with_name("throughput.py"), "model", "--recipe", recipe, *data, *BRIEF, "--json", file)
        done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise BenchmarkError(
                f"--recipe {recipe}: its model's rate could not be measured (code {done.returncode}, see above); "
                "give it with --model-rate"
            )
        return float(json.loads(file.read_text())["modes"]["model"]["images_per_second"]["median"])
