"""docs/attention.md has every mask (that its code runs: tests/test_readme.py)."""

import re
from pathlib import Path

from bsjax import masks

TEXT = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")


def test_nothing_is_missing():
    table = re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE)
    assert sorted(table) == sorted(set(masks.__all__) - {"Mask"})
