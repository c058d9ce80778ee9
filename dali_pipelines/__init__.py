"""Pipelines that decode shards, make views of images and write down every number they drew.

Importing this sets OMP_WAIT_POLICY to PASSIVE where it is not set: torch's CPU threads otherwise spin while they wait,
and take the cores from the pipeline's threads and from other processes (measured in docs/lab-notebook.md).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
