"""Make or verify WebDataset shards for DALI: the command `iwm shards`, in a checkout."""

import sys

from shards.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
