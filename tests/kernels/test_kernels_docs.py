"""docs/kernels.md promises what the code does (its examples run in tests/test_readme.py)."""

from pathlib import Path

from pallas_kernels import config
from pallas_kernels.epilogue import ACTIVATIONS

TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_says_what_the_code_says():
    *most, last = config.SIDES
    assert f"sides of {', '.join(map(str, most))} and {last}" in TEXT
    assert config.BLOCK == 128 * 256
    assert "up to 128 x 256" in TEXT
    assert ", ".join(f'"{name}"' for name in ACTIVATIONS) in TEXT
