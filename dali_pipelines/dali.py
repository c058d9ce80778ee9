"""Imports from NVIDIA DALI, with one line of installation help.

Raises DaliMissing where DALI is not installed. Augmentation settings, replay and everything that uses a trained model
work without DALI.
"""

from __future__ import annotations

from shards.errors import UserError


class DaliMissing(UserError, ModuleNotFoundError):
    """DALI is not installed; the message says how to install it."""


try:
    from nvidia.dali import Pipeline, fn, pipeline_def, types
    from nvidia.dali import __version__ as dali_version
    from nvidia.dali import math as dali_math
except ModuleNotFoundError as error:
    raise DaliMissing(
        "NVIDIA DALI is not installed, and every data pipeline needs it. On Linux: pip install 'iwm[cuda13]' (GPU "
        "driver 580 or newer, or no GPU) or 'iwm[cuda12]' (driver 525 or newer); in a checkout: pip install -e "
        "'.[cuda13]' or '.[cuda12]'",
        name=error.name,
    ) from error

__all__ = ["Pipeline", "dali_math", "dali_version", "fn", "pipeline_def", "types"]
