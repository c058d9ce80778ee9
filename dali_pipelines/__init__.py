"""Pipelines that decode shards, make views of images and write down every number they drew.

Importing this sets GOMP_SPINCOUNT where neither it nor OMP_WAIT_POLICY is set; for this process it counts if torch is
not loaded yet. torch's CPU threads otherwise spin for long while they wait, and take the cores from the pipeline's
threads and from other processes (measured in docs/lab-notebook.md).
"""

import os

DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Distributions that bring DALI; one of them is installed."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
