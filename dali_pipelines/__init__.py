"""DALI pipelines that decode shards and make views, crops and full images; two_views records its sampled parameters.

Importing this package sets GOMP_SPINCOUNT where neither it nor OMP_WAIT_POLICY is set. In this process it takes effect
only if torch is not loaded yet. Without it, torch's waiting CPU threads spin for a long time and take cores from the
pipeline's threads and from other processes (measured in docs/lab-notebook.md).
"""

import os

DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Packages that provide DALI; one of them is installed."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
