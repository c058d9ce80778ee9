"""Mark for tests in which stock timm loads an exported folder."""

import pytest
import timm
from packaging.version import Version

FIRST = "1.0.29"

needs_local_dir = pytest.mark.skipif(
    Version(timm.__version__) < Version(FIRST),
    reason=f"timm {timm.__version__} reads no safetensors from a local folder; {FIRST} does",
)
