"""docs/modules.md names every initialiser (that its code runs: tests/test_readme.py)."""

import inspect
from pathlib import Path

from bsjax import inits

TEXT = (Path(__file__).parents[2] / "docs" / "modules.md").read_text(encoding="utf-8")


def test_names_every_initialiser():
    written_here = {
        name
        for name, f in vars(inits).items()
        if inspect.isfunction(f) and f.__module__ == inits.__name__ and not name.startswith("_")
    }
    assert {f for f in written_here - {"initialize"} if f"`inits.{f}" not in TEXT} == set()
