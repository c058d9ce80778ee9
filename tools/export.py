"""Export a trained model: the command `iwm export`, in a checkout."""

import sys

from iwm.export.__main__ import main
from shards.command_line import run_command

if __name__ == "__main__":
    sys.exit(run_command(main, "tools/export.py"))
