"""Pretrain an Image World Model: torchrun iwm/train.py RECIPE [--scenario NAME] [--run-dir DIR] [--SECTION.FIELD ...]

Rerun the same command to resume from the newest checkpoint in the run's folder.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

from iwm.recipes import parse
from shards.errors import run_command


def main() -> None:
    command = parse(sys.argv[1:], __doc__)
    command.config.check()
    # Imported late: torch and DALI take seconds to import, and a mistyped option must fail at once.
    from iwm.evaluation.health import health_check
    from iwm.training.distributed import init_distributed
    from iwm.training.loop import pretrain
    from iwm.training.runtime import stop_on_signal
    from iwm.training.train_state import build_train_state, run_lock

    with (
        init_distributed(command.config.train) as dist,
        stop_on_signal() as stop,
        run_lock(command.run_dir) if dist.is_main else nullcontext(),
    ):
        state = build_train_state(command.config, command.run_dir, dist)
        pretrain(state, stop, health_check(command.config, dist))


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/train.py"))
