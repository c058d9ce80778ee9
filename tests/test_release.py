"""The version of a release is the same wherever it is written."""

import re
from pathlib import Path

import yaml

from iwm import __version__

ROOT = Path(__file__).parents[1]


def test_the_newest_changes_and_the_citation_are_of_this_version() -> None:
    newest = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest is not None
    assert (citation["version"], citation["date-released"]) == newest.groups()
    assert citation["version"] == __version__
