"""Pretrain an Image World Model: RECIPE or --config FILE [--scenario NAME] [--run-dir DIR] [--SECTION.FIELD VALUE ...]

On several GPUs: torchrun --nproc_per_node 8 iwm/train.py RECIPE …, or -m iwm.train instead of the file; or srun with
one task per GPU. FILE is the config.yaml of a run. Rerun the same command to resume from the run's newest checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from iwm.ranges import check_ranges
from iwm.train_options import TrainOptions, parse
from iwm.training.watchdog import Watchdog
from shards.command_line import run_command
from shards.format import load_manifest


def main(arguments: Sequence[str] | None = None, prog: str = "iwm/train.py") -> int:
    """Train; return the exit status: 0, or --stop-status where a signal stopped the training before its last step.

    arguments: None for those of the program. Raises UserError for what the user can fix.
    """
    command = parse(sys.argv[1:] if arguments is None else arguments, __doc__, prog)
    command.config.check()
    check_ranges(command)
    load_manifest(command.config.data.folder, command.config.data.train)
    with Watchdog(command.config.train.collective_timeout) as watchdog:
        return _train(command, watchdog)


def _train(command: TrainOptions, watchdog: Watchdog) -> int:
    # Imported late: torch and DALI take seconds to import, and a mistyped option or path must fail at once.
    from iwm.evaluation.health import health_check
    from iwm.training.distributed import init_distributed
    from iwm.training.loop import pretrain
    from iwm.training.runtime import stop_on_signal
    from iwm.training.train_state import build_train_state, run_lock
    from iwm.training.wandb_logger import check_wandb

    with (
        init_distributed(command.config.train, watchdog=watchdog) as dist,
        stop_on_signal() as stop,
        watchdog.explaining_losses(),
        run_lock(command.run_dir) if dist.is_main else nullcontext(),
    ):
        if dist.is_main:
            check_wandb(command.config.log)
        state = build_train_state(command.config, command.run_dir, dist)
        pretrain(state, stop, health_check(command.config, dist))
        watchdog.leave()
        # A launcher may end all processes once one has ended with another status than 0: the main one must be done.
        dist.wait_for_all()
        return 0 if state.step == state.schedules.steps else command.stop_status


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/train.py"))
