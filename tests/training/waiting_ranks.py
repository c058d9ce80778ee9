"""Job without a model, for the watchdog's tests: python waiting_ranks.py FOLDER [RANK]

Every process takes steps of one all-reduce for ever. RANK reads its data of step 5 from FOLDER/data, a FIFO to which
nobody writes. Rank 0 writes the number of its steps to FOLDER/steps.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from iwm.train_config import TrainConfig
from iwm.training.distributed import init_distributed
from iwm.training.rank_progress import Phase
from iwm.training.runtime import stop_on_signal
from iwm.training.watchdog import Watchdog
from shards.command_line import run_command


def main() -> None:
    folder, hanging = Path(sys.argv[1]), [int(rank) for rank in sys.argv[2:]]
    train = replace(TrainConfig(device="cpu"), collective_timeout=10)
    with (
        Watchdog(train.collective_timeout) as watchdog,
        init_distributed(train, watchdog=watchdog) as dist,
        stop_on_signal(),
        watchdog.explaining_losses(),
    ):
        for step in range(1, 100_000):
            dist.progress.enter(Phase.WAITING)
            if step == 5 and dist.rank in hanging:
                (folder / "data").read_bytes()
            dist.progress.enter(Phase.TRAINING)
            dist.sum(torch.ones(1))
            dist.progress.complete_step(step)
            if dist.is_main:
                (folder / "steps").write_text(str(step))
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(run_command(main, "waiting_ranks.py"))
