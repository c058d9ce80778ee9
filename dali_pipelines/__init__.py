"""DALI pipelines that decode shards and make views, crops and full images; two_views records its sampled parameters.

Importing this package sets two environment variables where the user has not:

- GOMP_SPINCOUNT, unless OMP_WAIT_POLICY is set. In this process it takes effect only if torch is not loaded yet.
  Without it, torch's waiting CPU threads spin for a long time and take cores from the pipeline's threads and from
  other processes.
- CUDA_DEVICE_MAX_CONNECTIONS, the number of the GPU's hardware queues that streams share. It takes effect only if CUDA
  is not initialised yet. With CUDA's default of 8, the pipeline's 30 streams share queues with the CUDA graph of a
  training step, and a decoder's kernel can wait for the whole step.

Both are measured in docs/lab-notebook.md.
"""

import os

DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Packages that provide DALI; one of them is installed."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
